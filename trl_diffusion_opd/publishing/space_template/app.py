# SPDX-License-Identifier: Apache-2.0
"""
Demo of a LoRA student: what its base, the student and its teachers draw from the same noise.

Needs nothing but the packages in `requirements.txt` and the `demo.json` beside it, which `trl-diffusion-opd space`
writes. Runs on the CPU, on a GPU and on ZeroGPU.
"""

import html
import json
import random
from pathlib import Path


try:
    import spaces  # before torch: on ZeroGPU it stands in for CUDA until a GPU is lent
except ImportError:
    spaces = None

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file


HERE = Path(__file__).resolve().parent
DEMO = json.loads((HERE / "demo.json").read_text(encoding="utf-8"))
DEFAULTS, LIMITS, GUIDANCE = DEMO["defaults"], DEMO["limits"], DEMO["guidance"]
TEACHERS = {name: f"teacher_{index}" for index, name in enumerate(DEMO["teachers"])}
MAX_SEED = 2**31 - 1
MAX_CACHED = 64
SMALL, SHOWN = 256, 512  # images smaller than SMALL pixels are enlarged to about SHOWN

Job = tuple[str | None, float]  # an adapter, none for the base, and its strength


class ModelProblem(Exception):
    """A model cannot be loaded; the message says what to do."""


def load_models() -> DiffusionPipeline:
    """Loads the base with the student and every teacher as adapters."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, DEMO["dtype"]) if device == "cuda" else torch.float32
    name, revision = DEMO["base"]["id"], DEMO["base"].get("revision")
    local = HERE / name
    if not local.is_dir():
        fetch(name, lambda: hf_hub_download(name, "model_index.json", revision=revision))
    pipe = fetch(
        name,
        lambda: DiffusionPipeline.from_pretrained(local if local.is_dir() else name, revision=revision, dtype=dtype),
    )
    pipe.set_progress_bar_config(disable=True)
    load_lora(pipe, DEMO["student"], "student")
    for task, adapter in TEACHERS.items():
        load_lora(pipe, DEMO["teachers"][task], adapter)
    return pipe.to(device)


def load_lora(pipe: DiffusionPipeline, lora: dict, adapter: str) -> None:
    """Adds a LoRA in the format of diffusers or of PEFT to the pipeline."""
    names = [lora["weight_name"]] if lora.get("weight_name") else ["pytorch_lora_weights.safetensors"]
    names += ["adapter_model.safetensors", "adapter_config.json"]
    folder = HERE / lora["id"]
    if not folder.is_dir():
        prefix = f"{lora['subfolder']}/" if lora.get("subfolder") else ""
        patterns = [f"{prefix}{name}" for name in names]
        root = fetch(
            lora["id"],
            lambda: snapshot_download(lora["id"], revision=lora.get("revision"), allow_patterns=patterns),
        )
        folder = Path(root) / prefix
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if weights.is_file() and config.is_file():
        # load_lora_weights would take nothing from such a file, and its scaling is in the other one.
        tensors = load_file(weights)
        pipe.transformer.load_lora_adapter(
            {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()},
            prefix=None,
            adapter_name=adapter,
            metadata=json.loads(config.read_text(encoding="utf-8")),
        )
    elif (folder / names[0]).is_file():
        pipe.load_lora_weights(folder, weight_name=names[0], adapter_name=adapter)
    if adapter not in getattr(pipe.transformer, "peft_config", {}):
        raise ModelProblem(f"There is no LoRA of the transformer in {lora['id']} ({' or '.join(names[:2])}).")


def fetch(repo_id: str, action):
    """Runs a download and says what to do if it fails."""
    page = f"https://huggingface.co/{repo_id}"
    secret = "add a token of that account as the secret HF_TOKEN in the settings of the Space and restart it"
    try:
        return action()
    except GatedRepoError as error:
        raise ModelProblem(
            f"The model {repo_id} is gated. Accept its license at {page} with your account, then {secret}."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelProblem(
            f"The model {repo_id} was not found. Check its name at {page}. If it is private, use an account that can "
            f"see it: {secret}."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelProblem(f"The model {repo_id} could not be loaded ({type(error).__name__}: {error}).") from error


def seconds(jobs: list[Job], prompt: str, seed: int, steps: int, guidance: float, progress: gr.Progress) -> float:
    """Time to ask ZeroGPU for."""
    return 10 + 0.2 * len(jobs) * steps


def draw(
    jobs: list[Job], prompt: str, seed: int, steps: int, guidance: float, progress: gr.Progress
) -> list[Image.Image]:
    """Draws an image for each job, all from the same noise. Sets all that it depends on itself."""
    arguments = {name: DEFAULTS[name] for name in DEFAULTS.keys() - {"num_inference_steps", "guidance_scale"}}
    arguments[GUIDANCE["argument"]] = guidance + GUIDANCE["offset"]  # what the pipeline calls it
    drawn = []
    for index, (adapter, strength) in enumerate(jobs):

        def report(pipe, step, timestep, tensors, index=index):
            progress((index * steps + step + 1, len(jobs) * steps), unit="steps")
            return tensors

        try:
            if adapter is None:
                PIPE.disable_lora()
            else:
                PIPE.set_adapters([adapter], [strength])
            output = PIPE(
                prompt=prompt,
                num_inference_steps=steps,
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=report,
                callback_on_step_end_tensor_inputs=[],
                **arguments,
            )
        finally:
            PIPE.enable_lora()
        drawn.append(output.images[0])
    return drawn


if spaces is not None:
    draw = spaces.GPU(duration=seconds)(draw)


CACHE: dict[tuple, Image.Image] = {}


def draw_cached(
    jobs: list[Job], prompt: str, seed: int, steps: int, guidance: float, progress: gr.Progress
) -> list[Image.Image]:
    """Draws only what was not drawn lately with the same settings."""
    keys = [(job, prompt, seed, steps, guidance) for job in jobs]
    found = {key: CACHE[key] for key in keys if key in CACHE}
    missing = [key for key in dict.fromkeys(keys) if key not in found]
    if missing:
        images = draw([key[0] for key in missing], prompt, seed, steps, guidance, progress)
        found |= zip(missing, images, strict=True)
    for key, image in found.items():  # the latest stay
        CACHE.pop(key, None)
        CACHE[key] = image
    while len(CACHE) > MAX_CACHED:
        CACHE.pop(next(iter(CACHE)))
    return [found[key] for key in keys]


def enlarge(image: Image.Image) -> Image.Image:
    """Enlarges a tiny image by a whole factor, pixel by pixel."""
    longest = max(image.size)
    factor = SHOWN // longest if longest < SMALL else 1
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def refuse(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


def check_number(value, name: str, low: float, high: float, whole: bool = False) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value != int(value)):
        raise refuse(f"{name} must be a {'whole ' if whole else ''}number from {low:g} to {high:,.10g}.")
    return int(value) if whole else float(value)


def check_prompt(prompt) -> str:
    prompt = prompt.strip() if isinstance(prompt, str) else ""
    if not prompt:
        raise refuse("Type a prompt first, or click an example.")
    if len(prompt) > LIMITS["prompt"]:
        raise refuse(f"The prompt may have {LIMITS['prompt']} characters and has {len(prompt)}. Shorten it.")
    return prompt


def warn_about(prompt: str) -> None:
    """Says what of a prompt the model cannot read."""
    tokenizers = [part for name, part in PIPE.components.items() if name.startswith("tokenizer") and part is not None]
    first, last = tokenizers[0], tokenizers[-1]
    unknown = [word for word in prompt.split() if first.unk_token and first.unk_token in first.tokenize(word)]
    if unknown:
        gr.Warning(f"This model has never seen: {html.escape(', '.join(unknown))}. Try the words of the examples.")
    if len(last(prompt)["input_ids"]) > DEFAULTS.get("max_sequence_length", 256):
        gr.Warning("The prompt is longer than this model reads: its end does not count.")


def check_inputs(prompt, seed, random_seed, steps, guidance, strength, teachers) -> tuple:
    """Returns the inputs as they are drawn with, or says which of them is wrong."""
    if not isinstance(teachers, list) or not TEACHERS.keys() >= set(teachers):
        raise refuse(f"Teachers must be some of: {', '.join(TEACHERS) or 'none'}.")
    return (
        check_prompt(prompt),
        random.randint(0, MAX_SEED) if random_seed else check_number(seed, "Seed", 0, MAX_SEED, whole=True),
        check_number(steps, "Steps", 1, LIMITS["num_inference_steps"], whole=True),
        check_number(guidance, "Guidance", 0, LIMITS["guidance_scale"]),
        check_number(strength, "LoRA strength", 0, LIMITS["strength"]),
        [name for name in TEACHERS if name in teachers],
    )


def check(*inputs) -> None:
    """Runs before `generate`, outside of its queue, so that a mistake is told at once and the last images stay."""
    check_inputs(*inputs)


def generate(
    prompt,
    seed,
    random_seed,
    steps,
    guidance,
    strength,
    teachers,
    progress=gr.Progress(),  # noqa: B008, the default is how Gradio finds it
):
    """Draws one prompt with the base, the student and the chosen teachers."""
    prompt, seed, steps, guidance, strength, teachers = check_inputs(
        prompt, seed, random_seed, steps, guidance, strength, teachers
    )
    warn_about(prompt)

    jobs = [(None, 0.0), ("student", strength) if strength else (None, 0.0)]
    jobs += [(TEACHERS[name], 1.0) for name in teachers]
    images = iter(draw_cached(jobs, prompt, seed, steps, guidance, progress))
    shown = [gr.update(value=enlarge(next(images)), alt_text=f"{name}: {prompt}") for name in ("Base", "Student")]
    for name in TEACHERS:
        image = enlarge(next(images)) if name in teachers else None
        shown.append(gr.update(value=image, visible=name in teachers, alt_text=f"Teacher {name}: {prompt}"))
    note = f"Seed {seed}, {steps} steps, guidance {guidance:g}, student at strength {strength:g}."
    return [seed, note, *shown]


def links() -> str:
    """The pages of the models, but for those that lie in the Space itself."""
    models = {"Base": DEMO["base"], "student": DEMO["student"]}
    models |= {f"teacher of {name}": lora for name, lora in DEMO["teachers"].items()}
    on_hub = {name: model["id"] for name, model in models.items() if not (HERE / model["id"]).is_dir()}
    return ", ".join(f"{name} [{repo_id}](https://huggingface.co/{repo_id})" for name, repo_id in on_hub.items())


CSS = """
.images { display: flex !important; flex-wrap: wrap !important; justify-content: center; }
.images > .block { flex: 1 1 140px !important; min-width: 140px !important; max-width: 380px; margin: 0 !important; }
.images .empty { min-height: 0 !important; aspect-ratio: 1; }
@media (max-width: 640px) {
    #generate { flex-grow: 1 !important; }
    .images { display: grid !important; grid-template-columns: 1fr 1fr; }
    .images .icon-button-wrapper { top: auto !important; bottom: 0; }
}
"""
PIXELATED = ".images img { image-rendering: pixelated; }"


def build() -> gr.Blocks:
    with gr.Blocks(title=DEMO["title"], analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {DEMO['title']}\n\n{DEMO['description']}")
        if PROBLEM:
            gr.Markdown(f"## This demo cannot start\n\n{PROBLEM}")
            return page
        prompts = DEMO["prompts"]
        first = next((texts[0] for texts in prompts.values() if texts), "")
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(first, label="Prompt", max_lines=3, max_length=LIMITS["prompt"], min_width=300)
            button = gr.Button("Generate", variant="primary", scale=0, min_width=160, elem_id="generate")
        with gr.Row(elem_classes="images"):
            options = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
            images = [gr.Image(label=name, **options) for name in ("Base", "Student")]
            images += [gr.Image(label=f"Teacher {name}", visible=False, **options) for name in TEACHERS]
        note = gr.Markdown("The same seed is the same noise for every image.")
        with gr.Row():
            for task, texts in prompts.items():
                with gr.Column(min_width=280):
                    gr.Examples([[text] for text in texts], [prompt], label=f"Try: {task}", cache_examples=False)
        with gr.Row(equal_height=True):
            with gr.Column(min_width=220):
                seed = gr.Number(0, label="Seed", precision=0)
                random_seed = gr.Checkbox(False, label="Random seed each time")
            with gr.Column(min_width=220):
                steps = gr.Slider(
                    1,
                    LIMITS["num_inference_steps"],
                    DEFAULTS["num_inference_steps"],
                    step=1,
                    label="Steps",
                    info="More take longer",
                )
            with gr.Column(min_width=220):
                guidance = gr.Slider(
                    0,
                    LIMITS["guidance_scale"],
                    DEFAULTS["guidance_scale"],
                    step=0.1,
                    label="Guidance",
                    info=GUIDANCE["info"],
                    visible=not GUIDANCE["fixed"],
                )
            with gr.Column(min_width=220):
                strength = gr.Slider(0, LIMITS["strength"], 1.0, step=0.05, label="LoRA strength", info="0: the base")
        teachers = gr.CheckboxGroup(list(TEACHERS), label="Also draw with the teacher of", visible=bool(TEACHERS))
        gr.Markdown(links())
        inputs = [prompt, seed, random_seed, steps, guidance, strength, teachers]
        checked = gr.on([button.click, prompt.submit], check, inputs, concurrency_limit=None, api_visibility="private")
        checked.success(
            generate,
            inputs,
            [seed, note, *images],
            api_name="generate",
            show_progress_on=images,
            concurrency_limit=1,  # there is one pipeline, and its adapters are switched
        )
    return page.queue(max_size=16)


try:
    PIPE, PROBLEM = load_models(), None
except ModelProblem as problem:
    PIPE, PROBLEM = None, str(problem)
    print(PROBLEM, flush=True)

page = build()

small = DEFAULTS.get("height", SMALL) < SMALL
LAUNCH = {
    "theme": gr.themes.Default(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"),
    "css": CSS + PIXELATED if small else CSS,
    "footer_links": ["api", "gradio", "settings"],
    "ssr_mode": False,
}

if __name__ == "__main__":
    page.launch(**LAUNCH)
