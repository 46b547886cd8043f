# SPDX-License-Identifier: Apache-2.0
"""A tiny base with LoRAs, prompts and rewards, and `trl-diffusion-opd eval` on them."""

from pathlib import Path

import torch

from tests.support.tiny import random_lora, save_diffusers_lora, save_peft_lora, tiny_pipeline
from trl_diffusion_opd.evaluation.benchmark import suites
from trl_diffusion_opd.evaluation.benchmark.arguments import EvaluationArguments
from trl_diffusion_opd.evaluation.benchmark.average import paper_table
from trl_diffusion_opd.evaluation.benchmark.folder import ResultsFolder
from trl_diffusion_opd.evaluation.benchmark.run import evaluate


PROMPTS = ["a red circle", "two blue squares", "a boat & a <b>house</b>", "a tree at night", "a cat"]
REWARDS = """
from pathlib import Path

def brightness(images, prompts, **columns):
    with open(Path(__file__).with_name("calls"), "a") as file:
        file.write(f"{len(images)} ")
    return images.mean((1, 2, 3)).tolist()

def picky(images, prompts, **columns):
    return [None if "boat" in prompt else 0.25 for prompt in prompts]

def broken(images, prompts, **columns):
    raise RuntimeError("no judge today")
"""
STEPS, GUIDANCE, LENGTH, SIZE = 3, 2.0, 16, 16


class World:
    """A tiny base, two LoRAs in the two formats, prompts, and rewards that count their calls."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = folder / "base"
        with torch.random.fork_rng(devices=[]):
            tiny_pipeline().save_pretrained(self.base)
        save_diffusers_lora(folder / "student", *random_lora(seed=1, scale=0.3))
        save_peft_lora(folder / "other", *random_lora(rank=2, alpha=3, seed=2, scale=0.3))
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        (folder / "rewards.py").write_text(REWARDS)
        self.loras = {"student": folder / "student", "other": folder / "other"}

    def reward(self, *names: str) -> dict:
        return {None: [f"{self.folder / 'rewards.py'}:{name}" for name in names]}

    def evaluate(self, name: str, **changes) -> dict:
        arguments = {
            "loras": self.loras,
            "benchmarks": ["words"],
            "prompts": {"words": str(self.folder / "prompts.txt")},
            "rewards": self.reward("brightness"),
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": LENGTH,
            "use_cpu": True,
            "output_dir": self.folder / name,
        }
        return evaluate(EvaluationArguments(**{"model": self.base, **arguments, **changes}))

    @property
    def calls(self) -> list[int]:
        """Numbers of images that `brightness` was given since it was last asked."""
        file = self.folder / "calls"
        found = [int(word) for word in file.read_text().split()] if file.is_file() else []
        file.unlink(missing_ok=True)
        return found


def synthetic_results(folder: Path, scores: dict[str, dict[str, float]]) -> ResultsFolder:
    """A folder as an evaluation of the paper's benchmarks leaves it, with one image each."""
    results = ResultsFolder(folder)
    columns = dict(
        zip(paper_table().columns, ("geneval", "ocr", *suites.BENCHMARKS["drawbench"].rewards), strict=True)
    )
    factors = {"PickScore": 26.0, "UnifiedReward": 5.0}
    benchmarks = {}
    for name in ("geneval", "ocr", "drawbench"):
        rewards = {reward: reward for reward in suites.BENCHMARKS[name].rewards}
        about = {"title": suites.BENCHMARKS[name].title, "num_images": 1, "num_prompts": 1, "rewards": rewards}
        benchmarks[name] = {**about, "origin": {"name": "here", "repo_type": "dataset"}, "prompts": "0" * 64}
        results.save_prompts(name, [{"prompt": "a\u2028b", "tag": "colors", "include": []}])
    models = {name: {"guidance_scale": 4.5, "weights": [], "origins": []} for name in scores}
    drawn = {"num_inference_steps": 40, "resolution": 512, "dtype": "bfloat16", "seed": 42}
    base = {"origin": {"name": "them/base"}, "weights": "ab" * 20}
    results.save_settings({"base": base, **drawn, "models": models, "benchmarks": benchmarks})
    for model, row in scores.items():
        for name in benchmarks:
            results.save_image(torch.zeros(3, 4, 4), model, name, 0)
        for column, value in row.items():
            name = columns[column]
            benchmark = name if name in benchmarks else "drawbench"
            results.add_scores(model, benchmark, name, 0, {0: value / factors.get(column, 1.0)})
    return results
