# SPDX-License-Identifier: Apache-2.0
"""Files of benchmarks: what is read from them, where their paths lead, and how bad ones are told."""

from pathlib import Path

import pytest

from tests.support.space_app import SHAPES
from trl_diffusion_opd.evaluation.benchmark.suites import BENCHMARKS, choose_benchmarks, load_rows, read_benchmarks


MINE = """
- name: mine
  title: Mine, words
  prompts: words.txt
  rewards: [rewards.py:length, ocr]
- name: others
  prompts: owner/name
  rewards: package.module:function
"""


# Each of its lines is ten times the one before.
BOMB = "".join(f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "words.txt").write_text("a cat\na dog\n")
    (tmp_path / "set" / "mine.yaml").write_text(MINE)
    return tmp_path / "set" / "mine.yaml"


def test_paths_are_those_beside_the_file(file, monkeypatch, tmp_path):
    (tmp_path / "words.txt").write_text("of another folder\n")
    for folder, word in ((tmp_path, "set/mine.yaml"), (tmp_path / "set", "mine.yaml"), (Path("/"), str(file))):
        monkeypatch.chdir(folder)
        mine, others = choose_benchmarks([word])
        assert (mine.name, mine.title, mine.source) == ("mine", "Mine, words", str(tmp_path / "set" / "words.txt"))
        assert mine.rewards == (f"{tmp_path / 'set' / 'rewards.py'}:length", "ocr")
        assert (others.title, others.source, others.rewards) == ("others", "owner/name", ("package.module:function",))
        assert [row["prompt"] for row in load_rows(mine)[0]] == ["a cat", "a dog"]


def test_one_of_a_file_and_others(file):
    chosen = choose_benchmarks([f"{file}:mine", "ocr"], {"ocr": "x.txt"}, {"mine": ["aesthetic"]})
    assert [each.name for each in chosen] == ["mine", "ocr"]
    assert chosen[0].rewards == ("aesthetic",) and chosen[1].source == "x.txt"
    assert [each.name for each in choose_benchmarks([f"{file}:mine", str(file)])] == ["mine", "others"]
    file.write_text("name: alone\nprompts: words.txt\nrewards: ocr\n")
    assert list(read_benchmarks(file)) == ["alone"]


def test_those_of_the_package_and_of_the_example():
    assert list(BENCHMARKS) == ["geneval", "geneval2", "ocr", "drawbench", "pickapic"]
    assert [each.title for each in BENCHMARKS.values()] == ["GenEval", "GenEval 2", "OCR", "DrawBench", "Pick-a-Pic"]
    assert BENCHMARKS["pickapic"].rewards == BENCHMARKS["drawbench"].rewards
    assert all(each.source.startswith("https://raw.githubusercontent.com/") for each in BENCHMARKS.values())
    shapes = read_benchmarks(SHAPES / "benchmarks.yaml")
    for task in ("geneval", "ocr", "aesthetic"):
        benchmark = shapes.pop(f"shapes_{task}")
        assert benchmark.title == f"Shapes, {task}" and benchmark.rewards == (f"{SHAPES / 'rewards.py'}:{task}",)
        assert Path(benchmark.source) == SHAPES / "prompts" / f"{task}_test.txt" and Path(benchmark.source).is_file()
    assert not shapes


def test_the_package_does_not_know_the_example():
    with pytest.raises(
        ValueError, match=r"no benchmark 'shapes'\. .*; one of your own is a file \(`--benchmarks path/to"
    ):
        choose_benchmarks(["shapes"])
    folder = Path(choose_benchmarks.__code__.co_filename).parent
    assert not [file.name for file in folder.iterdir() if file.is_file() and "shapes" in file.read_text().lower()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "benchmark 1: must have `name`, `prompts` and `rewards`, but is a NoneType"),
        ("[]", "holds no benchmark. Give it `name`, `prompts` and `rewards`"),
        ("a: [", "is no YAML: "),
        ("!!python/object/apply:os.system [touch ran]", "is no YAML: could not determine a constructor"),
        ("- 3", "benchmark 1: must have `name`, `prompts` and `rewards`, but is a int"),
        ("name: a\nprompts: b\nrewards: c\nreward: d", "benchmark 1: there is no 'reward'. It has `name`, `title`"),
        ("name: 3\nprompts: b\nrewards: c", "benchmark 1: `name` must be text, but is 3"),
        ("name: a\nrewards: c", "benchmark 1: `prompts` must be text, but is None"),
        ("name: a\nprompts: b", "benchmark 1: `rewards` must be a name or a list of names, but is None"),
        ("name: a\nprompts: b\nrewards: [c, 4]", "`rewards` must be a name or a list of names, but is ['c', 4]"),
        ("- {name: a, prompts: b, rewards: c}\n- {name: a, prompts: d, rewards: c}", "has two benchmarks 'a'"),
        (f"rewards: &a0 [x]\n{BOMB}prompts: b\nname: *a9", "benchmark 1: there is no 'b1'. It has"),
        (f"name: {'[' * 2000}{']' * 2000}", "is no YAML: maximum recursion depth exceeded"),
        (f"name:\n- &a0 [x]\n{BOMB.replace('b', '- b')}prompts: b\nrewards: c", "`name` must be text, but is [["),
        ("name: a/b\nprompts: b\nrewards: c", "A benchmark cannot be called 'a/b'"),
    ],
)
def test_bad_files(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(content)
    with pytest.raises(ValueError) as error:
        choose_benchmarks(["bad.yaml"])
    assert message in str(error.value) and "bad.yaml" in str(error.value) or "called 'a/b'" in str(error.value)
    assert not Path("ran").exists()


def test_files_and_benchmarks_that_are_not_there(file):
    with pytest.raises(ValueError, match=r"There is no file of benchmarks 'none\.yml'\. Check the path"):
        choose_benchmarks(["none.yml"])
    with pytest.raises(ValueError, match=r"mine\.yaml' has no benchmark 'yours', only mine, others\."):
        choose_benchmarks([f"{file}:yours"])
    file.with_name("second.yaml").write_text("name: mine\nprompts: other.txt\nrewards: ocr\n")
    with pytest.raises(ValueError, match="`--benchmarks` has two benchmarks 'mine'"):
        choose_benchmarks([str(file), str(file.with_name("second.yaml"))])
