# SPDX-License-Identifier: Apache-2.0
"""
The record of a dry run of the recipe for Stable Diffusion 3.5: the recipe as it is, on stand-ins that a loopback Hub
serves under the names of base and teachers.

    python -m tests.sd35_dry_run model_cards/sd35_medium_dry_run
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml
from diffusers import SD3Transformer2DModel

from tests.support.hub_server import ROOT, HubServer, run
from tests.support.tiny import random_lora, save_peft_lora, tiny_pipeline
from trl_diffusion_opd.hub.locations import Origin
from trl_diffusion_opd.publishing.record import RunRecord


RECIPE = ROOT / "examples" / "configs" / "sd35_medium.yaml"
BASE, TEACHERS = "stabilityai/stable-diffusion-3.5-medium", "quanhaol/DiffusionOPD"
# The license in the front matter of the base's card, as it was in 2026.
BASE_CARD = b"""---
license: other
license_name: stabilityai-ai-community
license_link: LICENSE.md
---
"""

DRY_RUN = """
import sys
from trl_diffusion_opd.cli.recipe import parse_recipe
from trl_diffusion_opd.cli.train import METHODS
recipe, folder, prompts = sys.argv[1:]
argv = ["--config", recipe, "--output_dir", f"{folder}/sd35m-opd", "--datasets", prompts, "--eval_datasets", prompts]
how = METHODS["opd"]
script_args, args, recipe = parse_recipe([*argv, "--use_cpu"], (how.arguments, how.config))
how.trainer(args=args, **script_args.trainer_arguments(recipe)).make_record().save(folder)
"""


def serve_stand_ins(hub: HubServer, folder: Path) -> None:
    """Puts a tiny base, which takes images of 512 px, and tiny teachers onto the Hub."""
    pipeline = tiny_pipeline()
    config = {**pipeline.transformer.config, "pos_embed_max_size": 128}
    pipeline.transformer = SD3Transformer2DModel.from_config(config)
    pipeline.save_pretrained(folder / "base")
    hub.put(BASE, {**_files(folder / "base"), "README.md": BASE_CARD})
    for seed, name in enumerate(("AesTeacher", "OCRTeacher", "GenEvalTeacher")):
        save_peft_lora(folder / "teachers" / name / "lora", *random_lora(rank=8, alpha=16, seed=seed))
    hub.put(TEACHERS, _files(folder / "teachers"))


def dry_run(hub: HubServer, folder: Path) -> RunRecord:
    """The record, without what is only of the stand-ins: commits, fingerprints, prompts, precision and device."""
    serve_stand_ins(hub, folder)
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    (folder / "prompts.txt").write_text("a red circle\na boat\n")
    prompts = json.dumps({task: str(folder / "prompts.txt") for task in recipe["datasets"]})
    done = run(DRY_RUN, hub.environment(folder / "home"), RECIPE, folder, prompts)
    assert done.returncode == 0, done.stderr
    record = RunRecord.load(folder)
    record.base = replace(record.base, commit=None)
    record.teachers = [replace(t, origin=replace(t.origin, commit=None), sha256="") for t in record.teachers]
    for name, sets in (("datasets", record.prompts), ("eval_datasets", record.eval_prompts)):
        for prompts in sets:
            prompts.origin = Origin(recipe[name][prompts.task], repo_type="dataset")
            prompts.num_prompts, prompts.num_seen, prompts.examples = None, None, []
    record.dtype, record.hardware = "bfloat16", {"num_processes": record.hardware["num_processes"]}
    return record


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, HubServer(Path(scratch) / "hub") as server:
        dry_run(server, Path(scratch)).save(sys.argv[1])
