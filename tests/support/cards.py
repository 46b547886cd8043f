# SPDX-License-Identifier: Apache-2.0
"""A record of a run, and what holds for every card."""

import re
from dataclasses import replace
from pathlib import Path

from trl_diffusion_opd.hub.licenses import License
from trl_diffusion_opd.hub.locations import Origin
from trl_diffusion_opd.publishing.record import GalleryImage, PromptSet, RunRecord, TeacherRecord


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def example_record(**changes) -> RunRecord:
    """The record of a finished run whose parts are all on the Hub."""
    prompts = Origin("me/prompts", "me/prompts", COMMIT, "dataset")
    record = RunRecord(
        name="student",
        summary="One LoRA for 2 tasks.",
        base=Origin("them/base", "them/base", COMMIT),
        repo_id="me/student",
        base_license=License("apache-2.0"),
        tags=["trl", "diffusion-opd"],
        teachers=[
            TeacherRecord("ocr", Origin("a/teachers/ocr@v1", "a/teachers", COMMIT), 4.5, "ab" * 32),
            TeacherRecord("scene", Origin("b/full", "b/full", COMMIT), 1.0, "cd" * 32, is_lora=False),
        ],
        prompts=[PromptSet("ocr", prompts, 1200, examples=["a sign"]), PromptSet("scene", prompts)],
        eval_prompts=[
            PromptSet(t, Origin("me/held", "me/held", COMMIT, "dataset"), 40, 64, 0) for t in ("ocr", "scene")
        ],
        inference={
            "height": 512,
            "width": 768,
            "num_inference_steps": 40,
            "guidance_scale": 4.5,
            "max_sequence_length": 128,
        },
        settings={"learning_rate": 0.0003, "lora_r": 32},
        rounds=300,
        planned_rounds=300,
        images_per_round=72,
        seconds=7500.4,
        hardware={"device": "NVIDIA H100", "num_processes": 8, "peak_memory_gb": 41.5},
        gallery=[GalleryImage('a "red" cat | dog', "images/ocr_0.png", "ocr", 7, 300)],
        results={
            "base": {"ocr": 0.25, "scene": 0.5},
            "teachers": {"ocr": {"ocr": 0.75, "scene": 0.4}, "scene": {"ocr": 0.1, "scene": 0.5}},
            "merge": {"ocr": 0.3, "scene": 0.3},
            "student": {"ocr": 0.70004, "scene": 0.45},
        },
        reward_names={"ocr": ["reads", "sharp"], "scene": ["pretty"]},
        reward_docs={"reads": "1 if it can be read."},
        grid="images/step_000300.png",
        curves="curves.png",
        paper={"title": "A method", "id": "1234.5", "citation": "@article{a_method}"},
        versions={"trl-diffusion-opd": "0.1.0", "trl": "1.16.0"},
        date="2026-11-23",
    )
    return replace(record, **changes)


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def assert_reads_well(card: str) -> None:
    """Nothing is missing, empty or of this machine."""
    body = card.split("---\n", 2)[2]
    text = re.sub(r"```.*?```", "code", body, flags=re.DOTALL)
    for word in ("None", " nan ", "{{", "{%", "[]", "()", "\n\n\n", "/tmp", str(Path.home()), "/work", "hf_"):
        assert word not in text, word
    assert not re.search(r"\bNone\b|/tmp/|hf_[a-z]", card)
    assert body.count("```") % 2 == 0
    lines = [line for line in text.splitlines() if line]
    assert not any(a.startswith("## ") and b.startswith("## ") for a, b in zip(lines, lines[1:], strict=False))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count(" | ") for line in block.replace("|  |", "| x |").splitlines()}) == 1, block
    compile(snippet(card), "snippet", "exec")
