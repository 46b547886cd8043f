# SPDX-License-Identifier: Apache-2.0
"""Prompt sets and the samples of a round."""

import functools
import http.server
import json
import threading
import time
from collections import Counter

import PIL.Image
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from huggingface_hub.utils import httpx

from tests.support.runs import PROMPTS, make_trainer
from tests.support.tiny import tiny_pipeline
from trl_diffusion_opd.data.prompt_sets import load_prompts, task_datasets
from trl_diffusion_opd.data.rounds import RoundSampler, StreamedPrompts, num_prompts, prompt_at, sample_seed, spread
from trl_diffusion_opd.hub.errors import SourceError
from trl_diffusion_opd.models.prompt_encoder import PromptEncoder
from trl_diffusion_opd.models.registry import family_of
from trl_diffusion_opd.models.velocity import Conditioning
from trl_diffusion_opd.utils.hardware import on_device


def test_text_and_json_files(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\n\n  two squares \n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"prompt": p, "tag": i}) for i, p in enumerate("xy")))
    rows, origin = load_prompts(tmp_path / "a.txt")
    assert rows["prompt"] == ["a red circle", "two squares"]
    assert (origin.name, origin.url) == (f"{tmp_path.name}/a.txt", None)
    rows, _ = load_prompts(str(tmp_path / "b.jsonl"))
    assert rows["prompt"] == ["x", "y"] and rows["tag"] == [0, 1]


def test_options_of_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\n\n  two squares \n")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(f'{{"caption": "of {split}"}}\n{{"caption": "more"}}\n')
    streamed, _ = load_prompts({"path": tmp_path / "a.txt", "streaming": True})
    assert num_prompts(streamed) is None
    assert [streamed[position]["prompt"] for position in range(3)] == ["a red circle", "two squares", "a red circle"]
    rows, origin = load_prompts({"path": str(folder), "split": "test[:1]", "column": "caption"})
    assert rows[:] == {"prompt": ["of test"]}
    assert origin.name == f"{tmp_path.name}/set"
    streamed, _ = load_prompts({"path": folder / "test.jsonl", "column": "caption", "streaming": True})
    assert streamed[0] == {"prompt": "of test"}
    assert (
        load_prompts({"path": folder / "test.jsonl", "split": "train[1:]"}, column="caption")[0][0]["caption"]
        == "more"
    )


def test_files_at_an_address(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\ntwo squares\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "x", "include": [{"class": "dog", "count": 2}]}\n')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert load_prompts(f"{address}/a.txt")[0]["prompt"] == ["a red circle", "two squares"]
        rows, origin = load_prompts(f"{address}/b.jsonl?token=secret")
        assert rows[0]["include"] == [{"class": "dog", "count": 2}]
        assert origin.name == "http://127.0.0.1/b.jsonl"
        with pytest.raises(ValueError, match="cannot be streamed"):
            load_prompts({"path": f"{address}/b.jsonl", "streaming": True})
        with pytest.raises(
            OSError, match=r"downloading http://127.0.0.1/missing.txt failed: .*404.*Check the address"
        ):
            load_prompts(f"{address}/missing.txt")
        server.shutdown()


def test_all_forms_of_a_tasks_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    data, origins = task_datasets(
        {
            "file": tmp_path / "a.txt",
            "list": ["x"],
            "rows": [{"prompt": "y", "tag": 1}],
            "set": Dataset.from_list([{"prompt": "z"}]),
            "mapping": {"path": tmp_path / "a.txt"},
        },
        None,
    )
    assert {task: rows["prompt"] for task, rows in data.items()} == {
        "file": ["one", "two"],
        "list": ["x"],
        "rows": ["y"],
        "set": ["z"],
        "mapping": ["one", "two"],
    }
    assert {task: origin.name for task, origin in origins.items()} == {
        "file": f"{tmp_path.name}/a.txt",
        "list": "in memory",
        "rows": "in memory",
        "set": "in memory",
        "mapping": f"{tmp_path.name}/a.txt",
    }


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


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
        ({"a": stream_of([])}, "`train_dataset\\['a'\\]` has no rows"),
        ({"a": stream_of([{"text": "x"}])}, "has no column 'prompt', only \\['text'\\]. Set `column`"),
        ({"a": stream_of([{"prompt": 3}])}, "must hold text, but row 0 holds 3"),
        ({"a": {"split": "train"}}, "a mapping must have the `path` of the prompts, but has \\['split'\\]"),
        ({"a": "nowhere"}, "A prompt set location must be an existing local path or `owner/repo`.*but is 'nowhere'"),
        ({"a": {"path": "me/set@v1", "revision": "v2"}}, "'me/set@v1'.*the revision is there twice"),
        (["x"], "must be a dictionary from task to prompts"),
        ({"b": ["x"]}, "`train_dataset` names unknown tasks \\['b'\\]. The tasks are \\['a'\\]"),
        ([{"prompt": "x"}], "one dataset without a `task` column"),
    ],
)
def test_what_is_no_prompt_set_is_refused(data, message):
    with pytest.raises((ValueError, SourceError), match=message):
        task_datasets(data, ["a"])


def sampler(batch_size=2, processes=1, index=0, **kwargs):
    datasets, _ = task_datasets({"a": [f"a{i}" for i in range(7)], "b": [f"b{i}" for i in range(3)]}, None)
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


# Streams


class Reading:
    """A stream of `total` rows that counts how many were read, and fails as often as it is told to at a row."""

    def __init__(self, total, fail_at=None, error=None, times=0):
        self.total, self.fail_at, self.error, self.times = total, fail_at, error, times
        self.read = 0

    def __call__(self):
        for index in range(self.total):
            if index == self.fail_at and self.times > 0:
                self.times -= 1
                raise self.error
            self.read += 1
            yield {"prompt": f"p{index}", "tag": index, "image": b"pixels"}


def streamed(reading):
    # Passed as it is: `datasets` would pickle what it makes a fingerprint of.
    class Stream:
        def __iter__(self):
            return reading()

    return StreamedPrompts(Stream(), owner="`train_dataset['a']`", column="prompt")


def test_a_stream_is_read_as_far_as_it_is_asked_for_and_kept():
    reading = Reading(5)
    data = streamed(reading)
    assert data[1] == {"prompt": "p1", "tag": 1}, "bytes are left out"
    assert (data[0]["prompt"], reading.read) == ("p0", 2)
    assert [data[position]["tag"] for position in (4, 5, 6, 13)] == [4, 0, 1, 3], "at its end it starts over"
    assert reading.read == 5
    assert spread(data, 3) == [0, 1, 2]
    assert spread(Dataset.from_list([{"prompt": "x"}] * 10), 3) == [0, 3, 6]
    assert prompt_at(Dataset.from_list([{"prompt": "x"}, {"prompt": "y"}]), 3) == {"prompt": "y"}


def test_images_of_a_stream_are_left_out():
    row = {"prompt": "x", "boxes": [{"class": "dog", "score": 0.5}], "note": None}
    data, _ = task_datasets({"a": stream_of([{**row, "image": PIL.Image.new("RGB", (2, 2))}])}, None)
    assert data["a"][0] == row


def test_the_rounds_of_a_stream_take_its_rows_in_order():
    datasets = {"a": streamed(Reading(100)), "b": task_datasets({"b": ["b0", "b1"]}, None)[0]["b"]}
    one, two = (
        [RoundSampler(datasets, 4 // processes, 3, num_processes=processes, process_index=i) for i in range(processes)]
        for processes in (1, 2)
    )
    assert [row["tag"] for row in one[0].batches(2)[0].rows] == [8, 9, 10, 11]
    assert [row["tag"] for sampler in two for row in sampler.batches(2)[0].rows] == [8, 9, 10, 11]
    assert one[0].rounds_per_epoch is None
    assert one[0].distinct_prompts(1000) is None


def test_a_stream_goes_on_after_a_failure_that_passes(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    reading = Reading(5, fail_at=3, error=httpx.ReadError("reset"), times=2)
    data = streamed(reading)
    assert [data[position]["tag"] for position in range(5)] == [0, 1, 2, 3, 4]
    assert (waits, reading.times) == ([1, 2], 0)


@pytest.mark.parametrize(
    ("error", "kind", "message", "waits"),
    [
        (
            httpx.ReadError("reset"),
            SourceError,
            "row 3 of the stream could not be read.*broke off.*checkpoint",
            [1, 2, 4],
        ),
        (ConnectionError("Server Disconnected"), SourceError, "also after some attempts: Server Disconnected", []),
        (ValueError("bad json"), ValueError, "row 3 of the stream cannot be read: bad json", []),
        (KeyError("mine"), KeyError, "mine", []),
    ],
)
def test_a_stream_that_fails_for_good_says_which_and_where(monkeypatch, error, kind, message, waits):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    data = streamed(Reading(5, fail_at=3, error=error, times=99))
    with pytest.raises(kind, match=message) as info:
        data[4]
    assert waited == waits
    assert kind is KeyError or str(info.value).startswith("`train_dataset['a']`: ")


def test_streams_need_to_be_told_how_much_of_them_to_use(tmp_path):
    streams = {task: stream_of([{"prompt": prompt} for prompt in prompts]) for task, prompts in PROMPTS.items()}
    with pytest.raises(ValueError, match="`train_dataset` has a stream, whose length is not known. Set `max_steps`"):
        make_trainer(tmp_path, data=streams, max_steps=-1)
    with pytest.raises(ValueError, match="`eval_dataset` has streams \\(scene\\).*Set `num_eval_images`"):
        make_trainer(tmp_path, eval_dataset={"count": PROMPTS["count"], "scene": streams["scene"]})


# Encoding


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def encoder(pipeline, **kwargs):
    settings = {"max_sequence_length": 16, "batch_size": 2, "offload": True, "show_progress": False}
    return PromptEncoder(pipeline, family_of(pipeline), torch.device("cpu"), **{**settings, **kwargs})


def test_embeddings_are_those_of_the_pipeline(pipeline):
    prompts = ["a red circle", "two blue squares", "a boat at night"]
    conditioning = encoder(pipeline).conditioning(prompts)
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(prompts, None, None, max_sequence_length=16)
    expected = (
        {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
        {"prompt_embeds": negative, "pooled_prompt_embeds": negative_pooled},
    )
    for found, tensors in zip(conditioning.batch(2.0), expected, strict=True):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[name], tensor.expand_as(found[name]), rtol=1e-5, atol=1e-6)
            assert len(found[name]) == len(prompts)
    assert conditioning.batch(1.0) == (conditioning.positive, None)


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
    prompts = encoder(pipeline)
    conditioning = Conditioning(prompts.family, list(prompts.encode(["a"]).values()))
    with pytest.raises(ValueError, match="Guidance needs the embeddings of a negative prompt.*Encode '' too"):
        conditioning.batch(4.5)
