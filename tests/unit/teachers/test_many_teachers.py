# SPDX-License-Identifier: Apache-2.0
"""Twenty LoRA teachers on one base: what they add, and that it costs no more to add the last than the first."""

from collections import Counter

import pytest
import torch
from torch import nn

from tests.support.runs import make_trainer, student_state
from tests.support.tiny import random_lora, save_diffusers_lora, tiny_inputs, tiny_transformer, velocity
from trl_diffusion_opd.lora.adapters import add_lora, lora_state_dict, use_adapter
from trl_diffusion_opd.lora.files import read_lora
from trl_diffusion_opd.utils.hardware import module_bytes


NUMBER = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    return [save_diffusers_lora(folder / str(seed), *random_lora(seed=seed)) for seed in range(NUMBER)]


def test_they_add_their_adapters_only_and_leave_each_other_alone(folders):
    transformer = tiny_transformer()
    before = module_bytes(transformer)
    for number, folder in enumerate(folders):
        add_lora(transformer, read_lora(folder), f"teacher_{number}")
    config, state = random_lora()
    assert module_bytes(transformer) - before == NUMBER * 4 * sum(tensor.numel() for tensor in state.values())
    for number in range(NUMBER):
        expected = random_lora(seed=number)[1]
        found = lora_state_dict(transformer, f"teacher_{number}")
        assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)
    names = [name for name in transformer.state_dict() if "to_q.lora_A" in name and ".0." in name]
    assert [name.split(".")[-2] for name in names] == [f"teacher_{number}" for number in range(NUMBER)]
    alone = tiny_transformer()
    add_lora(alone, read_lora(folders[13]), "teacher_13")
    with torch.no_grad(), use_adapter(transformer, "teacher_13"), use_adapter(alone, "teacher_13"):
        assert velocity(transformer, tiny_inputs()).equal(velocity(alone, tiny_inputs()))


def test_the_last_is_added_in_as_many_steps_as_the_second(folders, monkeypatch):
    """Counted in modules that are walked over, which is what takes the time."""
    transformer, counts = tiny_transformer(), Counter()
    walk = nn.Module.named_modules

    def counted(self, *args, **kwargs):
        for found in walk(self, *args, **kwargs):
            counts[number] += 1
            yield found

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    for number, folder in enumerate(folders):
        add_lora(transformer, read_lora(folder), f"teacher_{number}")
        lora_state_dict(transformer, f"teacher_{number}")
    assert counts[NUMBER - 1] == pytest.approx(counts[1], rel=0.05) and counts[1] > 0


def test_one_that_cannot_be_added_takes_nothing_away(folders, tmp_path):
    transformer = tiny_transformer()
    add_lora(transformer, read_lora(folders[0]), "teacher_0")
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    save_diffusers_lora(tmp_path, *random_lora(tiny_transformer(num_layers=3)))
    with pytest.raises(ValueError, match="no place in the transformer"):
        add_lora(transformer, read_lora(tmp_path), "teacher_1")
    after = transformer.state_dict()
    assert list(after) == list(before) and all(after[name].equal(before[name]) for name in before)
    assert list(transformer.peft_config) == ["teacher_0"]


def test_a_round_runs_the_forwards_of_its_batches_only(folders, tmp_path):
    """With twenty teachers: each batch asks its own, and the student learns what it learns with its teacher alone."""
    teachers = {f"task{number}": str(folder) for number, folder in enumerate(folders)}
    trainer = make_trainer(
        tmp_path, teachers=teachers, data={task: ["a red circle"] for task in teachers}, max_steps=1
    )
    rows, calls = [], []
    trainer.transformer.register_forward_pre_hook(lambda module, args: rows.append(torch.is_grad_enabled()))
    for module in trainer.transformer.modules():
        for name, child in module.named_children():
            if name.startswith("teacher_") and isinstance(child, nn.Linear):
                child.register_forward_hook(lambda *args, name=name: calls.append(name))
    trainer.train()
    assert rows == [False, True] * 3 * NUMBER
    assert [name for index, name in enumerate(calls) if name not in calls[:index]] == [
        f"teacher_{number}" for number in range(NUMBER)
    ]
    assert len(set(Counter(calls).values())) == 1 and student_state(trainer)
