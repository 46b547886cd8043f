# SPDX-License-Identifier: Apache-2.0
"""The demo in a real browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tests.support.hub_server import ROOT
from tests.support.space_app import BASE, PROMPTS, TEACHERS, make_student
from trl_diffusion_opd.hub.locations import DIFFUSERS_WEIGHT_NAME


pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[demo]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[test]'")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"),
]

SERVE = """
import sys
from trl_diffusion_opd.publishing.space import run_space
from tests.support.space_app import BASE, TEACHERS

teachers = {task: TEACHERS / task for task in ("geneval", "aesthetic")}
run_space(sys.argv[1], port=int(sys.argv[2]), base=BASE, teachers=teachers)
"""
BROWSER_OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
PATIENCE = 30
FIRST = PROMPTS["geneval"][0]  # what stands in the field at first


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The demo of the Shapes student, served by [`run_space`] in a process of its own."""
    folder = tmp_path_factory.mktemp("browser")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, str(make_student(folder / "student")), str(port)]
    with open(folder / "log", "w") as log:
        # One thread as here: more would round differently.
        server = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="module")
def draw():
    """What plain diffusers draws with the student, or with the base alone, as the demo shows it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(TEACHERS / "ocr", weight_name=DIFFUSERS_WEIGHT_NAME)

    def draw(prompt, seed=0, lora=True, steps=10):
        pipe.enable_lora() if lora else pipe.disable_lora()
        generator = torch.Generator().manual_seed(seed)
        sampling = {"num_inference_steps": steps, "guidance_scale": 1.0, "max_sequence_length": 10}
        picture = np.asarray(pipe(prompt, generator=generator, **sampling).images[0])
        return picture.repeat(16, axis=0).repeat(16, axis=1)

    return draw


class Page:
    """The demo in a browser, as a person sees it."""

    def __init__(self, driver):
        self.driver = driver
        self.wait(lambda: self.find("textarea"))

    def find(self, selector: str):
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < deadline, f"still waiting; the page says: {self.find('body')[0].text}"
            time.sleep(0.05)
        return found

    def field(self, label: str):
        """The control with this accessible name."""
        return next(field for field in self.find("input, textarea, button") if field.accessible_name == label)

    def type(self, label: str, text: str):
        keys = webdriver.common.keys.Keys
        self.field(label).send_keys(keys.CONTROL, "a", keys.NULL, keys.DELETE, text, keys.TAB)

    def click(self, label: str):
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.field(label))
        self.field(label).click()

    def pictures(self) -> dict[str, str]:
        """The addresses of the images by their alternative text."""
        return {img.get_attribute("alt"): img.get_attribute("src") for img in self.find(".images img")}

    def shown(self, *names: str) -> list[np.ndarray]:
        """Waits for images and fetches them."""
        self.wait(lambda: set(names) <= self.pictures().keys())
        pictures = self.pictures()
        images = []
        for name in names:
            with urllib.request.urlopen(pictures[name], timeout=10) as response:
                images.append(np.asarray(PIL.Image.open(BytesIO(response.read()))))
        return images

    def said(self) -> str:
        """Waits for a message, reads it and closes it."""
        message = self.wait(lambda: "".join(toast.text for toast in self.find("[data-testid=toast-text]")))
        self.find("[data-testid=toast-close]")[0].click()
        self.wait(lambda: not self.find("[data-testid=toast-body]"))
        return message

    def is_as_wide_as_the_screen(self) -> bool:
        return self.driver.execute_script(
            "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    """Two browsers, the second started when it is needed; they share nothing."""

    def start():
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for option in (*BROWSER_OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        started.append(webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)))
        return started[-1]

    started = []
    yield lambda index: started[index] if index < len(started) else start()
    for driver in started:
        driver.quit()


@pytest.fixture
def browse(address, drivers):
    """Opens the demo on a screen of some size, as one user or another."""

    def browse(width: int = 1280, height: int = 900, user: int = 0) -> Page:
        driver = drivers(user)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get_log("performance")  # forgets what was before
        driver.get(address)
        return Page(driver)

    return browse


def test_prompt_in_two_images_out(browse, draw):
    page = browse()
    assert page.driver.title == "shapes-opd" and page.find("h1")[0].text == "shapes-opd"
    assert page.field("Prompt").get_property("value") == FIRST
    assert page.pictures() == {}
    page.type("Prompt", 'text "HX"')
    page.click("Generate")
    base, student = page.shown('Base: text "HX"', 'Student: text "HX"')
    assert np.array_equal(base, draw('text "HX"', lora=False))
    assert np.array_equal(student, draw('text "HX"'))
    assert not np.array_equal(base, student)

    # An example, a teacher, another seed
    page.click("a boat at sunset")
    page.click("aesthetic")
    page.type("Seed", "7")
    page.click("Generate")
    names = [f"{name}: a boat at sunset" for name in ("Base", "Student", "Teacher aesthetic")]
    base, student, teacher = page.shown(*names)
    assert page.pictures().keys() == set(names)
    assert np.array_equal(student, draw("a boat at sunset", seed=7))
    assert not np.array_equal(teacher, base) and not np.array_equal(teacher, student)

    # Strength 0 is the base
    page.type("number input for LoRA strength", "0")
    page.click("Generate")
    page.wait(lambda: "student at strength 0." in page.find("body")[0].text)
    assert np.array_equal(*page.shown(*names[:2]))

    # The page asks nobody but its server
    entries = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"}
    server = page.driver.current_url.rstrip("/")
    assert any(url.startswith(server) for url in asked)
    assert [url for url in asked if url.startswith(("http", "ws")) and not url.startswith(server)] == []


def test_bad_input_shows_a_message(browse):
    page = browse()
    page.click("Generate")
    pictures = page.shown(f"Base: {FIRST}", f"Student: {FIRST}")
    page.type("Prompt", "  ")
    page.click("Generate")
    assert "Type a prompt first, or click an example." in page.said()
    page.type("Prompt", FIRST)
    page.type("Seed", "-5")
    page.click("Generate")
    assert "Seed must be a whole number from 0 to 2,147,483,647." in page.said()
    for before, after in zip(pictures, page.shown(f"Base: {FIRST}", f"Student: {FIRST}"), strict=True):
        assert np.array_equal(before, after)  # the last images stay
    page.click("Random seed each time")
    page.type("Prompt", "a <b>cat at sunset")
    page.click("Generate")
    assert "This model has never seen: <b>cat." in page.said()
    page.shown("Base: a <b>cat at sunset")
    assert int(page.field("Seed").get_property("value")) > 0
    assert page.field("Prompt").get_property("maxLength") == 500


def test_two_users_at_once(browse, draw):
    prompts = ["two green circles", 'text "HX"']
    pages = [browse(user=0), browse(user=1)]
    for page, prompt in zip(pages, prompts, strict=True):
        page.type("Prompt", prompt)
        page.type("number input for Steps", "50")
        page.click("aesthetic")
    for button in [page.field("Generate") for page in pages]:
        button.click()
    assert [page.pictures() for page in pages] == [{}, {}]  # both are waiting
    for page, prompt in zip(pages, prompts, strict=True):
        base, student = page.shown(f"Base: {prompt}", f"Student: {prompt}")
        assert np.array_equal(base, draw(prompt, lora=False, steps=50))
        assert np.array_equal(student, draw(prompt, steps=50))


def test_fits_a_phone(browse):
    page = browse(390, 844)
    assert page.driver.execute_script("return window.innerWidth") == 390
    assert page.is_as_wide_as_the_screen()
    for name in ("geneval", "aesthetic", "Generate"):
        page.click(name)
    page.shown(f"Base: {FIRST}", f"Teacher aesthetic: {FIRST}")
    assert page.is_as_wide_as_the_screen()
    boxes = [picture.rect for picture in page.find(".images img")]
    assert len(boxes) == 4
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[1]["x"] > boxes[0]["x"] + 100  # side by side
    assert all(100 < box["width"] == box["height"] for box in boxes)
