# SPDX-License-Identifier: Apache-2.0
"""Prompt sets as they come: with a byte order mark, rows that hold no text, other endings, names that are no names."""

import json
import logging

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from trl_diffusion_opd.data.prompt_sets import load_prompts, task_datasets
from trl_diffusion_opd.data.tasks import check_task_name


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def prompts_of(data):
    return list(task_datasets({"a": data}, None)[0]["a"]["prompt"])


def refused(data):
    with pytest.raises(ValueError) as info:
        task_datasets({"a": data}, None)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\ntwo\n"),
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n'),
        ("a.json", '[{"prompt": "one"}, {"prompt": "two"}]'),
        ("a.csv", "prompt\none\ntwo\n"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path, name, content, streaming):
    path = tmp_path / name
    path.write_bytes(BYTE_ORDER_MARK + content.encode())
    data, _ = load_prompts({"path": path, "streaming": streaming})
    assert [data[row]["prompt"] for row in range(2)] == ["one", "two"]


def test_endings_may_be_in_capitals(tmp_path):
    (tmp_path / "A.TXT").write_text("one\n")
    (tmp_path / "B.JsonL").write_text('{"prompt": "two"}\n')
    assert prompts_of(tmp_path / "A.TXT") + prompts_of(str(tmp_path / "B.JsonL")) == ["one", "two"]


@pytest.mark.parametrize("value", [None, 3, ["x"]])
def test_every_row_must_hold_text(tmp_path, value):
    rows = [{"prompt": "x"}, {"prompt": "y"}, {"prompt": value}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = f"`train_dataset['a']`: column 'prompt' must hold text, but row 2 holds {value!r}."
    assert refused(rows) == refused(str(tmp_path / "a.jsonl")) == message


def test_a_row_of_a_list_must_be_a_prompt_or_a_row():
    assert "must hold prompts or rows (dictionaries), but row 1 is None" in refused(["x", None])
    assert "the rows have no common form: " in refused([{"prompt": "x", "tag": 1}, {"prompt": "y", "tag": "z"}])


def test_rows_with_an_empty_prompt_are_left_out_and_told(tmp_path, caplog):
    rows = [{"prompt": prompt} for prompt in ("x", "", " \n", "y")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for data in (rows, tmp_path / "a.jsonl"):
        with caplog.at_level(logging.WARNING):
            assert prompts_of(data) == ["x", "y"]
        assert caplog.messages == ["`train_dataset['a']`: 2 of 4 rows have an empty prompt and are left out."]
        caplog.clear()
    stream = task_datasets({"a": IterableDataset.from_generator(lambda: iter(rows))}, None)[0]["a"]
    assert [stream[row]["prompt"] for row in range(3)] == ["x", "y", "x"]
    assert caplog.messages == ["`train_dataset['a']`: row 1 has an empty prompt; such rows are left out."]
    assert "`train_dataset['a']` has no rows" in refused(["", " "])


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_file_is_refused(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text("")
    message = refused({"path": str(tmp_path / "a.jsonl"), "streaming": streaming})
    assert "has no rows. Give the task prompts" in message


def test_a_folder_with_a_loading_script_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("raise SystemExit('it ran')\n")
    message = refused(tmp_path / "set")
    assert "cannot be read: Dataset scripts are no longer supported, but found set.py. Convert it" in message


def test_what_save_to_disk_wrote_is_read(tmp_path):
    data = Dataset.from_list([{"prompt": "x"}, {"prompt": "y"}])
    data.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict(train=data, test=Dataset.from_list([{"prompt": "z"}])).save_to_disk(tmp_path / "several")
    assert prompts_of(tmp_path / "one") == prompts_of(tmp_path / "several") == ["x", "y"]
    assert prompts_of({"path": str(tmp_path / "several"), "split": "test"}) == ["z"]
    assert prompts_of({"path": str(tmp_path / "one"), "split": "train[1:]"}) == ["y"]
    message = refused({"path": str(tmp_path / "several"), "split": "dev"})
    assert "there is no split 'dev', only ['test', 'train']. Set `split`." in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strem": True}, "there is no option 'strem'. The usual ones are `path`, `name`, `split`, `revision"),
        ({"split": 3}, "`split` must be text, but is 3."),
        ({"column": None}, "`column` must be text, but is None."),
        ({"streaming": "yes"}, "`streaming` must be true or false, but is 'yes'."),
    ],
)
def test_options_that_are_none_are_refused_by_name(tmp_path, options, message):
    (tmp_path / "a.txt").write_text("x\n")
    assert message in refused({"path": str(tmp_path / "a.txt"), **options})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"prompt": "x"}\n')
    assert message in refused({"path": str(tmp_path / "set"), **options})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "a" * 300,
            "A task must be named in at most 200 bytes, since files are named after it, but 'aaaaaaaaaaaaaaaa",
        ),
        ("é" * 101, "has 202. Choose a shorter name."),
        ("../../../esc", "A task must be a name that files can have, but '../../../esc' has '/'. Use letters, digits"),
        ("a\\b", "has '\\\\'"),
        ("a\nb", "has '\\n'"),
        ("..", "A task must not start with '.', since files are named after it, but is '..'."),
        ("-rf", "must not start with '-'"),
        ("", "A task must be a non-empty string without spaces around it, but is ''."),
        (" a", "without spaces around it, but is ' a'."),
        (7, "A task must be a non-empty string without spaces around it, but is 7."),
    ],
)
def test_names_of_tasks_that_no_file_can_have_are_refused(task, message):
    with pytest.raises(ValueError) as info:
        task_datasets({task: ["x"]}, None)
    assert message in str(info.value)


@pytest.mark.parametrize("task", ["ocr", "Draw Bench", "text+layout", "zähler_2.1", "数える", "a" * 200, "<lambda>"])
def test_names_of_tasks(task):
    check_task_name(task)
    assert task_datasets({task: ["x"]}, None)[0].keys() == {task}


def test_a_row_without_a_task_is_refused():
    data = Dataset.from_list([{"prompt": "x", "task": "a"}, {"prompt": "y", "task": None}])
    with pytest.raises(ValueError, match="`train_dataset`: row 1 has no `task`. Name it, or leave the row out."):
        task_datasets(data, None)
