# SPDX-License-Identifier: Apache-2.0
"""Two processes resume what one has saved: the samples of a round are the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import distributed_resume


CONFIG = Path(__file__).parents[3] / "examples" / "accelerate_configs" / "cpu_2.yaml"
LORA = "pytorch_lora_weights.safetensors"


@pytest.mark.slow
def test_two_processes_resume_what_one_has_saved(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    distributed_resume.make(one, 4).train()
    shutil.copytree(one, two)
    shutil.rmtree(two / "out" / "checkpoint-2")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    command += ["--main_process_port", "0", distributed_resume.__file__, str(two), "2"]
    run = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((two / "result.json").read_text())
    assert result == {"first_step": 1, "steps": 2, "processes": 2}
    assert run.stderr.count("per_device_train_batch_size 4 -> 2") == 1, "told by one of them"
    start, *ends = [
        load_file(folder / "out" / name / LORA)
        for folder, name in ((one, "checkpoint-1"), (one, "checkpoint-2"), (two, "checkpoint-2"))
    ]
    moved = max((ends[0][name] - tensor).abs().max() for name, tensor in start.items())
    assert moved > 0
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-3 * moved.item())
