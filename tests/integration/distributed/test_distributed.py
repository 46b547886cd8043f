# SPDX-License-Identifier: Apache-2.0
"""Two processes do what one process does with twice the batch, and reduce the gradients once a round."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import distributed_families, distributed_objectives, distributed_rl_run


SCRIPT = Path(__file__).parents[2] / "support" / "distributed_run.py"
RL_SCRIPT = Path(__file__).parents[2] / "support" / "distributed_rl_run.py"
FAMILIES_SCRIPT = Path(__file__).parents[2] / "support" / "distributed_families.py"
OBJECTIVES_SCRIPT = Path(__file__).parents[2] / "support" / "distributed_objectives.py"
CONFIGS = Path(__file__).parents[3] / "examples" / "accelerate_configs"


def launch(script: Path, folder: Path, num_processes: int, *arguments: int | float) -> dict:
    folder.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if num_processes > 1:
        command += ["--config_file", str(CONFIGS / "cpu_2.yaml"), "--main_process_port", "0"]
    command += [str(script), str(folder), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    one = launch(SCRIPT, tmp_path / "one", 1, 4, 0.7)  # batch size, noise level
    two = launch(SCRIPT, tmp_path / "two", 2, 2, 0.7)
    assert (one["processes"], two["processes"]) == (1, 2)
    weights = [load_file(tmp_path / run / "out" / "pytorch_lora_weights.safetensors") for run in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)
    for first, second in zip(one["logs"], two["logs"], strict=True):
        for name in ("loss", "grad_norm", "kl/count", "kl/scene", "kl_step/0"):
            assert second[name] == pytest.approx(first[name], rel=1e-3), name
    for name, value in one["metrics"].items():
        if "/" in name or name == "eval_loss":
            assert two["metrics"][name] == pytest.approx(value, rel=1e-3), name
    assert two["reductions"] == [0] * 3, "one reduction in each of 3 rounds"
    assert (tmp_path / "two" / "out" / "checkpoint-3" / "rng_state_1.pth").is_file()
    assert (tmp_path / "two" / "out" / "images" / "step_000003.png").is_file()


@pytest.mark.parametrize(
    ("script", "module"), [(FAMILIES_SCRIPT, distributed_families), (OBJECTIVES_SCRIPT, distributed_objectives)]
)
def test_two_processes_of_every_family_and_objective_equal_one(tmp_path, script, module):
    (tmp_path / "one").mkdir()
    module.main(tmp_path / "one", 2)
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    two = launch(script, tmp_path / "two", 2, 1)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, losses in one["losses"].items():
        assert two["losses"][name] == pytest.approx(losses, rel=1e-3), name
        first, second = (
            load_file(tmp_path / run / name / "out" / "pytorch_lora_weights.safetensors") for run in ("one", "two")
        )
        for tensor in first:
            torch.testing.assert_close(second[tensor], first[tensor], rtol=1e-2, atol=1e-4, msg=f"{name} {tensor}")


def test_two_processes_learn_from_the_same_rewards_as_one(tmp_path):
    """With groups that lie across the processes, batches of one that are not learned from, and failed scores."""
    (tmp_path / "one").mkdir()
    distributed_rl_run.main(tmp_path / "one", 4)
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    two = launch(RL_SCRIPT, tmp_path / "two", 2, 2)
    for method in ("grpo", "nft"):
        assert (one[method]["processes"], two[method]["processes"]) == (1, 2)
        weights = [
            load_file(tmp_path / run / method / "out" / "checkpoint-4" / "pytorch_lora_weights_raw.safetensors")
            for run in ("one", "two")
        ]
        moved = max(tensor.abs().max() for name, tensor in weights[0].items() if "lora_B" in name)
        assert moved > 0
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-3 * moved.item())
        compared = set()
        for first, second in zip(one[method]["logs"], two[method]["logs"], strict=True):
            assert first.keys() == second.keys()
            for name in first:
                if "/" in name or name in ("loss", "grad_norm"):
                    assert second[name] == pytest.approx(first[name], rel=2e-3, abs=1e-7), name
                    compared.add(name)
        for name, value in one[method]["metrics"].items():
            if "/" in name:
                assert two[method]["metrics"][name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
        assert {"loss", "grad_norm", "reward/scene", "reward_failures/scene", "kl/scene"} <= compared
    assert any(two["grpo"]["idle"]) and not all(two["grpo"]["idle"]), "one process waited for the other"
    assert (tmp_path / "two" / "nft" / "out" / "checkpoint-4" / "old_policy.safetensors").is_file()
