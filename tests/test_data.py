# SPDX-License-Identifier: Apache-2.0
"""Prompt sets and the samples of a round."""

import functools
import http.server
import json
import threading
from collections import Counter

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from trl_diffusion_opd.data import RoundSampler, load_prompts, sample_seed, task_datasets
from trl_diffusion_opd.prompts import PromptEncoder, on_device

from .tiny import tiny_pipeline


def test_text_and_json_files(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\n\n  two squares \n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"prompt": p, "tag": i}) for i, p in enumerate("xy")))
    assert load_prompts(tmp_path / "a.txt")["prompt"] == ["a red circle", "two squares"]
    rows = load_prompts(str(tmp_path / "b.jsonl"))
    assert rows["prompt"] == ["x", "y"] and rows["tag"] == [0, 1]


def test_files_at_an_address(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\ntwo squares\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "x", "include": [{"class": "dog", "count": 2}]}\n')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert load_prompts(f"{address}/a.txt")["prompt"] == ["a red circle", "two squares"]
        assert load_prompts(f"{address}/b.jsonl?download=true")[0]["include"] == [{"class": "dog", "count": 2}]
        with pytest.raises(OSError):
            load_prompts(f"{address}/missing.txt")
        server.shutdown()


def test_all_forms_of_a_tasks_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    data = task_datasets(
        {
            "file": tmp_path / "a.txt",
            "list": ["x"],
            "rows": [{"prompt": "y", "tag": 1}],
            "set": Dataset.from_list([{"prompt": "z"}]),
        },
        None,
    )
    assert {task: rows["prompt"] for task, rows in data.items()} == {
        "file": ["one", "two"],
        "list": ["x"],
        "rows": ["y"],
        "set": ["z"],
    }


@pytest.mark.parametrize(
    "data, message",
    [
        ({"a": []}, "`train_dataset\\['a'\\]` has no rows"),
        ({"a": [{"text": "x"}]}, "has no column 'prompt', only \\['text'\\]. Rename one"),
        ({"a": [{"prompt": 3}]}, "must hold text, but row 0 holds 3"),
        ({"a": 7}, "must be a dataset, a list of prompts, a file or a Hub id"),
        ({"a": "nowhere.txt"}, "'nowhere.txt' does not exist"),
        (Dataset.from_list([{"prompt": "x"}]), "one dataset without a `task` column"),
        (DatasetDict(train=Dataset.from_list([{"prompt": "x"}])), "is a dictionary of splits \\(train\\). Choose one"),
        ({"a": IterableDataset.from_generator(lambda: iter([{"prompt": "x"}]))}, "is a streaming dataset"),
        (["x"], "must be a dictionary from task to prompts"),
        ({"b": ["x"]}, "`train_dataset` names unknown tasks \\['b'\\]. The tasks are \\['a'\\]"),
        ([{"prompt": "x"}], "one dataset without a `task` column"),
    ],
)
def test_what_is_no_prompt_set_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        task_datasets(data, ["a"])


def sampler(batch_size=2, processes=1, index=0, **kwargs):
    datasets = task_datasets({"a": [f"a{i}" for i in range(7)], "b": [f"b{i}" for i in range(3)]}, None)
    return RoundSampler(datasets, batch_size, seed=3, num_processes=processes, process_index=index, **kwargs)


@pytest.mark.parametrize("weights", [None, {"b": 2}])
def test_the_samples_of_a_round_do_not_depend_on_the_processes(weights):
    """One process with batch 4, two with 2, one with 2 and two micro-rounds: the same samples with the same noise."""

    def of_round(samplers, micro_rounds, task):
        batches = [b for s in samplers for m in range(micro_rounds) for b in s.batches(5, m) if b.task == task]
        return sorted((prompt, seed) for b in batches for prompt, seed in zip(b.prompts, b.seeds, strict=True))

    one = [sampler(4, weights=weights)]
    two = [sampler(2, 2, index, weights=weights) for index in range(2)]
    accumulated = [sampler(2, weights=weights, num_micro_rounds=2)]
    for task in ("a", "b"):
        expected = of_round(one, 1, task)
        assert len(expected) == 4 * one[0].weights[task]
        assert of_round(two, 1, task) == expected
        assert of_round(accumulated, 2, task) == expected


def test_every_prompt_is_used_once_per_pass_in_another_order():
    rounds = sampler(1)
    seen = [rounds.batches(r)[0].prompts[0] for r in range(14)]
    assert sorted(seen[:7]) == sorted(seen[7:]) == [f"a{i}" for i in range(7)]
    assert seen[:7] != seen[7:]
    assert rounds.rounds_per_epoch == 7


def test_weights_give_a_task_more_batches():
    counts = Counter(batch.task for batch in sampler(weights={"b": 3}).batches(0))
    assert counts == {"a": 1, "b": 3}


def test_going_back_to_an_earlier_round_gives_the_same_samples():
    rounds = sampler()
    early, late = rounds.batches(0), rounds.batches(9)
    assert [b.prompts for b in rounds.batches(0)] == [b.prompts for b in early]
    assert [b.seeds for b in rounds.batches(0)] == [b.seeds for b in early]
    assert [b.seeds for b in early] != [b.seeds for b in late]


def test_seeds_differ_in_everything_they_are_made_of():
    seeds = {
        sample_seed(seed, task, round_index, position)
        for seed in range(3)
        for task in ("a", "b")
        for round_index in range(5)
        for position in range(5)
    }
    assert len(seeds) == 150
    for seed in seeds:
        torch.Generator().manual_seed(seed)


# Encoding


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def encoder(pipeline, **kwargs):
    settings = {"max_sequence_length": 16, "batch_size": 2, "offload": True, "show_progress": False}
    return PromptEncoder(pipeline, torch.device("cpu"), **{**settings, **kwargs})


def test_embeddings_are_those_of_the_pipeline(pipeline):
    prompts = ["a red circle", "two blue squares", "a boat at night"]
    conditioning = encoder(pipeline).conditioning(prompts)
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(prompts, None, None, max_sequence_length=16)
    torch.testing.assert_close(conditioning.prompt_embeds, embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(conditioning.pooled_prompt_embeds, pooled, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(conditioning.batch(2.0)[0], torch.cat([negative, embeds]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(conditioning.batch(2.0)[1], torch.cat([negative_pooled, pooled]), rtol=1e-5, atol=1e-6)
    assert conditioning.batch(1.0)[0] is conditioning.prompt_embeds


def test_a_chunk_replaces_the_one_before_and_is_encoded_once(pipeline):
    prompts, asked = encoder(pipeline), []

    def chunk(*names):
        return lambda: asked.append(names) or names

    for number, names in ((0, ("a red circle", "a boat")), (0, ("a red circle", "a boat")), (1, ("a house",))):
        prompts.prepare(number, chunk(*names))
    assert asked == [("a red circle", "a boat"), ("a house",)]
    assert list(prompts._embeddings) == ["a house", ""], "the negative prompt is always there"


def test_text_encoders_are_moved_back_whatever_happens():
    class Module(torch.nn.Module):
        def to(self, device):
            moves.append(str(device))

    moves = []
    with pytest.raises(RuntimeError), on_device([Module(), None], torch.device("meta")):
        raise RuntimeError
    assert moves == ["meta", "cpu"]
    moves.clear()
    with on_device([Module()], torch.device("meta"), offload=False):
        pass
    assert moves == ["meta"]


def test_guidance_without_a_negative_prompt_is_refused(pipeline):
    conditioning = encoder(pipeline).conditioning(["a"])
    conditioning.negative_prompt_embeds = None
    with pytest.raises(ValueError, match="`guidance_scale=4.5` needs the embeddings of a negative prompt"):
        conditioning.batch(4.5)
