# SPDX-License-Identifier: Apache-2.0
"""A student of the Shapes world for the tests of the demo: the LoRA of a teacher, which draws unlike the base."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from trl_diffusion_opd.hub.licenses import License
from trl_diffusion_opd.hub.locations import DIFFUSERS_WEIGHT_NAME, Origin
from trl_diffusion_opd.publishing.record import GalleryImage, RunRecord, TeacherRecord


SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
BASE, TEACHERS = SHAPES / "base", SHAPES / "teachers"
INFERENCE = {
    "height": None,
    "width": None,
    "num_inference_steps": 10,
    "guidance_scale": 1.0,
    "max_sequence_length": 10,
}
PROMPTS = {
    "geneval": ["two green circles", "a red circle left of a blue square"],
    "ocr": ['text "HX"'],
    "aesthetic": ["a boat at sunset"],
}


def make_record(repo_id: str | None = None) -> RunRecord:
    return RunRecord(
        name="shapes-opd",
        summary="One LoRA that counts, spells and paints in the world of shapes.",
        base=Origin.local(BASE),
        repo_id=repo_id,
        base_license=License("apache-2.0"),
        teachers=[TeacherRecord(task, Origin.local(TEACHERS / task), 1.0, "0" * 64) for task in PROMPTS],
        inference=INFERENCE,
        dtype="float32",
        gallery=[
            GalleryImage(prompt, f"images/{index}.png", task)
            for index, (task, prompt) in enumerate((task, p) for task, texts in PROMPTS.items() for p in texts)
        ],
    )


def make_student(folder: Path, record: RunRecord | None = None, task: str = "ocr") -> Path:
    """Writes what a finished run leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TEACHERS / task / DIFFUSERS_WEIGHT_NAME, folder)
    (record or make_record()).save(folder)
    return folder


def load_app(folder: Path) -> ModuleType:
    """Imports the `app.py` of a written Space."""
    spec = importlib.util.spec_from_file_location(f"space_app_{folder.name}", folder / "app.py")
    app = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app
