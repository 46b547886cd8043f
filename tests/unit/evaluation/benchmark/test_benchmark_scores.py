# SPDX-License-Identifier: Apache-2.0
"""`trl-diffusion-opd eval`: scores, failed ones too, and what the tables make of them."""

import json

import pytest

from tests.support.benchmark_world import PROMPTS, REWARDS, World, synthetic_results
from tests.support.chat_server import LoopbackChat, with_probabilities
from tests.support.space_app import BASE, SHAPES, TEACHERS
from tests.support.tiny_geneval import save_tiny_models
from trl_diffusion_opd.evaluation.benchmark.average import average, paper_table
from trl_diffusion_opd.evaluation.benchmark.report import write_report


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("benchmark"))


# Scores


def test_failed_scores_are_counted_and_a_judge_that_fails_does_not_stop_the_others(world):
    with pytest.raises(
        ValueError, match=r"broken: no judge today \(All else is in '.*failures'. The same command goes"
    ):
        world.evaluate("failures", loras={}, rewards=world.reward("broken", "picky", "brightness"))
    summary = json.loads((world.folder / "failures" / "summary.json").read_text())
    results = {row["reward"]: row for row in summary["results"]}
    assert results["picky"] == {
        "model": "base",
        "benchmark": "words",
        "reward": "picky",
        "built_in": False,
        "mean": 0.25,
        "value": 0.25,
        "standard_error": 0.0,
        "num_images": 5,
        "num_scored": 4,
        "num_failed": 1,
    }
    assert (results["broken"]["mean"], results["broken"]["num_scored"], results["broken"]["num_failed"]) == (
        None,
        0,
        0,
    )
    assert results["brightness"]["num_scored"] == 5 and world.calls == [5]
    lines = (world.folder / "failures" / "base" / "words" / "picky.0.jsonl").read_text().split("\n")[1:]
    assert lines[2] == '{"image": "00003.png", "score": null}' and lines[3] == '{"image": "00004.png", "score": 0.25}'
    table = (world.folder / "failures" / "table.md").read_text()
    assert "| base | – | 0.250 | 0." in table
    assert "Scoring failed: picky on 1 of 5 images of base (words)." in table
    assert "Not scored yet: broken on 5 of 5 images of base (words)." in table


def test_built_in_rewards_on_real_images(world, tmp_path):
    """OCR with its real model, and GenEval's strict judgment by a detector that sees dogs everywhere."""
    save_tiny_models(tmp_path)
    (tmp_path / "ocr.txt").write_text('a sign that reads "hello"\na sign without words\n')
    demands = [("dog", "single_object"), ("cat", "single_object"), ("dog", "colors")]
    rows = [
        {"tag": tag, "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
        for name, tag in demands
    ]
    (tmp_path / "geneval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"model_name_or_path": str(tmp_path / "detector"), "clip_name_or_path": str(tmp_path / "clip")}
    summary = world.evaluate(
        "built_in",
        loras={},
        benchmarks=["geneval", "ocr"],
        prompts={name: str(next(tmp_path.glob(f"{name}.*"))) for name in ("geneval", "ocr")},
        rewards=None,
        reward_options={"geneval": {**options, "shortest_edge": 64}},
    )
    geneval, ocr = summary["results"]
    assert geneval["geneval"] == {
        "single_object": 0.5,
        "colors": 1.0,
        "score": 0.75,
        "accuracy": pytest.approx(2 / 3),
        "num_failed": 0,
    }
    assert (ocr["mean"], ocr["num_scored"], ocr["num_failed"]) == (0.0, 1, 1)
    assert summary["table"] == {"base": {"GenEval": pytest.approx(2 / 3), "OCR": 0.0}}
    assert summary["average"] == {"base": None}
    described = summary["settings"]["benchmarks"]["geneval"]["rewards"]["geneval"]
    assert described.startswith("geneval (clip_name_or_path=") and described.endswith("shortest_edge=64, strict=True)")
    table = (world.folder / "built_in" / "table.md").read_text()
    assert "| model | GenEval | OCR |" in table and "| base | 0.667 | 0.000 |" in table and "Average" not in table
    assert "| base | 0.500 | – | – | 1.000 | – | – | 0.750 | 0.667 |" in table


def test_geneval2_by_skill_and_by_atoms(world, tmp_path):
    """A judge on a server, who is sure of objects and less so of all else; the published form of the prompts."""
    rows = [
        {
            "prompt": "two green pigs",
            "atom_count": 3,
            "vqa_list": [
                ["How many pigs are in the image?", "two"],
                ["Are the pigs green?", "Yes"],
                ["Are there any pigs in the image?", "Yes"],
            ],
            "skills": ["count", "attribute", "object"],
        },
        {
            "prompt": "a cat behind five dogs",
            "atom_count": 4,
            "vqa_list": [["How many dogs are in the image?", "five"], ["Is the cat behind the dogs?", "Yes"]],
            "skills": ["count", "position"],
        },
    ]
    (tmp_path / "geneval2.jsonl").write_text("\n".join(map(json.dumps, rows)))
    down = []

    def answer(number, body):
        text = body["messages"][0]["content"][1]["text"]
        if "behind" in text and down:
            return 400
        if text.startswith("How many"):
            return with_probabilities({"Two": 0.36, "Five": 0.25, "Six": 0.1})
        return with_probabilities({"Yes": 1.0} if "any" in text else {"No": 0.5, "Yes": 0.36})

    arguments = {"loras": {}, "benchmarks": ["geneval2"], "prompts": {"geneval2": str(tmp_path / "geneval2.jsonl")}}
    with LoopbackChat(answer) as server:
        options = {"model_name_or_path": "judge", "base_url": server.url, "max_retries": 0}
        arguments |= {"rewards": None, "reward_options": {"geneval2": options}}
        down.append(True)
        (result,) = world.evaluate("geneval2", **arguments)["results"]
        assert (result["num_scored"], result["num_failed"], result["geneval2"]["atoms"].keys()) == (1, 1, {"3"})
        down.clear()
        summary = world.evaluate("geneval2", **arguments)
        assert len(server.requests) == 5 + 2, "what was scored is not asked again"
    (result,) = summary["results"]
    gms = [(0.36 * 0.36 * 1) ** (1 / 3), (0.25 * 0.36) ** (1 / 2)]
    assert result["value"] == result["mean"] == pytest.approx(sum(gms) / 2)
    assert result["geneval2"]["gm"] == pytest.approx(sum(gms) / 2)
    assert result["geneval2"]["am"] == pytest.approx((1.72 / 3 + 0.61 / 2) / 2)
    skills = {"object": 1.0, "attribute": 0.36, "count": (0.36 + 0.25) / 2, "position": 0.36}
    assert result["geneval2"]["skills"] == pytest.approx(skills)
    assert result["geneval2"]["atoms"] == pytest.approx({"3": gms[0], "4": gms[1]})
    folder = world.folder / "geneval2"
    lines = (folder / "base" / "geneval2" / "geneval2.0.jsonl").read_text().split("\n")[1:]
    assert [json.loads(line)["parts"] for line in lines] == [
        pytest.approx([0.36, 0.36, 1.0]),
        None,
        pytest.approx([0.25, 0.36]),
    ]
    table = (folder / "table.md").read_text()
    assert table.startswith(f"## GenEval 2\n\n| model | GenEval 2 |\n| --- | --- |\n| base | {sum(gms) / 2:.3f} |\n")
    assert "| model | GM | AM | object | attribute | count | position |\n" in table
    assert f"| base | {sum(gms) / 2:.3f} | 0.439 | 1.000 | 0.360 | 0.305 | 0.360 |\n" in table
    assert f"| model | 3 | 4 |\n| --- | --- | --- |\n| base | {gms[0]:.3f} | 0.300 |\n" in table
    assert "Published scores are 100 times these." in table
    row = json.loads((folder / "metadata.jsonl").read_text().splitlines()[0])
    assert row["geneval2"] == pytest.approx(gms[0]) and not {"vqa_list", "skills", "parts", "demands"} & row.keys()


def test_shapes(world):
    summary = world.evaluate(
        "shapes",
        model=BASE,
        loras={"aesthetic": TEACHERS / "aesthetic"},
        benchmarks=[str(SHAPES / "benchmarks.yaml")],
        prompts=None,
        rewards=None,
        num_images=8,
        num_inference_steps=6,
        guidance_scale=1.0,
        max_sequence_length=10,
    )
    rows = {(row["model"], row["benchmark"]): row for row in summary["results"]}
    assert rows["aesthetic", "shapes_aesthetic"]["mean"] > rows["base", "shapes_aesthetic"]["mean"] + 0.3
    assert rows["aesthetic", "shapes_ocr"]["mean"] < rows["base", "shapes_ocr"]["mean"] - 0.3
    assert summary["settings"]["resolution"] == 32 and all(row["num_scored"] == 8 for row in rows.values())
    table = (world.folder / "shapes" / "table.md").read_text()
    assert table.startswith("## Shapes\n\n| model | geneval | ocr | aesthetic |\n")
    # The paper's columns are of other scorers.
    assert summary["table"] == {"base": {}, "aesthetic": {}}


def test_a_reward_whose_file_has_changed_is_another_one(world, tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS)
    arguments = {"loras": {}, "rewards": {None: [f"{file}:picky"]}}
    summary = world.evaluate("judged", **arguments)
    file.write_text(REWARDS.replace("0.25", "0.5"))
    with pytest.raises(
        ValueError, match=r"benchmarks: words: functions: picky was [0-9a-f]{8} and is [0-9a-f]{8} now"
    ):
        world.evaluate("judged", **arguments)
    file.write_text(REWARDS)
    assert world.evaluate("judged", **arguments) == summary


def test_what_could_not_be_scored_is_scored_later(world, tmp_path):
    """A judge that answers once and then fails for a while; its first score is kept."""
    (tmp_path / "rewards.py").write_text(
        "from pathlib import Path\n"
        "def judge(images, prompts, **columns):\n"
        "    up = Path(__file__).with_name('up').exists()\n"
        "    with open(Path(__file__).with_name('asked'), 'a') as file:\n"
        "        file.write(''.join(f'{prompt}\\n' for prompt in prompts))\n"
        "    values = [1.0, float('-inf'), None, float('nan'), float('inf')]\n"
        "    return [0.5] * len(prompts) if up else values\n"
    )
    arguments = {"loras": {}, "rewards": {None: [f"{tmp_path / 'rewards.py'}:judge"]}}
    (result,) = world.evaluate("later", **arguments)["results"]
    assert (result["mean"], result["num_scored"], result["num_failed"]) == (1.0, 1, 4)
    assert "Infinity" not in (world.folder / "later" / "metadata.jsonl").read_text()
    (tmp_path / "up").touch()
    (result,) = world.evaluate("later", **arguments)["results"]
    assert (result["mean"], result["num_scored"], result["num_failed"]) == (0.6, 5, 0)
    world.evaluate("later", **arguments)
    assert (tmp_path / "asked").read_text().splitlines() == [*PROMPTS, *PROMPTS[1:]]


def test_metadata_that_is_not_genevals(world, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a cat", "metadata": "{\\"id\\": 3}"}\n')
    prompts = {"mine": str(tmp_path / "mine.jsonl")}
    summary = world.evaluate("metadata", loras={}, benchmarks=["mine"], prompts=prompts)
    assert summary["results"][0]["num_scored"] == 1 and world.calls == [1]


def test_one_reward_of_several_benchmarks_has_a_column_for_each(world):
    for name in ("one", "two"):
        (world.folder / f"{name}.txt").write_text(f"a {name}\n")
    prompts = {name: str(world.folder / f"{name}.txt") for name in ("one", "two")}
    rewards = world.reward("brightness")
    choice = {"loras": {}, "benchmarks": ["one", "two"], "prompts": prompts, "rewards": rewards}
    world.evaluate("columns", **choice)
    table = (world.folder / "columns" / "table.md").read_text()
    assert "## one\n\n| model | brightness |" in table and "## two\n\n| model | brightness |" in table
    choice |= {
        "benchmarks": [str(SHAPES / "benchmarks.yaml")],
        "prompts": None,
        "model": BASE,
        "num_images": 2,
        "max_sequence_length": 10,
    }
    world.evaluate("shape_columns", **choice)
    table = (world.folder / "shape_columns" / "table.md").read_text()
    assert "| model | geneval: brightness | ocr: brightness | aesthetic: brightness |" in table
    assert "geneval: brightness 2 (" in table and world.calls == [1, 1, 2, 2, 2]


# Table 1


def test_average_of_the_paper_rows_by_its_rule():
    expected = ".507 .672 .673 .000 .566 .500 .619 .857 .821 .731 .934 .984".split()
    reference = paper_table()
    assert [f"{average(row):.3f}"[1:] for row in reference.rows.values()] == expected
    published = [.390, .601, .599, 0, .484, .473, .550, .698, .763, .715, .851, .929]  # fmt: skip
    assert list(reference.published.values()) == published and "2605.15055" in reference.source
    assert list(reference.rows)[3:5] == ["SD3.5-M (w/o CFG)", "SD3.5-M + CFG"]
    best = reference.rows["DiffusionOPD"]
    assert average({**best, "GenEval": 2.4}) == pytest.approx(average(best) + (2.4 - 0.96) / 0.72 / 8), "not clipped"
    assert average({name: value for name, value in best.items() if name != "OCR"}) is None
    assert average({**best, "more": 1.0}) == average(best)


def test_table_in_the_scale_and_the_order_of_the_paper(tmp_path):
    rows = paper_table().rows
    full, part = rows["DiffusionOPD"], {"PickScore": 22.5, "OCR": 0.5}
    summary = write_report(synthetic_results(tmp_path, {"student": full, "base": part}))
    assert summary["table"]["student"] == pytest.approx(full) and summary["average"]["base"] is None
    lines = (tmp_path / "table.md").read_text().split("\n")
    columns = "GenEval | OCR | PickScore | ClipScore | HPSv2.1 | Aesthetic | ImageReward | UnifiedReward"
    assert lines[0] == "## The paper's Table 1" and lines[2] == f"| model | {columns} | Average |"
    assert lines[4] == "| student | 0.960 | 0.940 | 23.990 | 0.297 | 0.342 | 6.150 | 1.500 | 3.500 | 0.984 |"
    assert lines[5] == "| base | – | 0.500 | 22.500 | – | – | – | – | – | – |"
    text = "\n".join(lines)
    assert "GenEval 1; OCR 1; PickScore 1;" in text
    assert "Not scored yet: geneval on 1 of 1 images of base (geneval); clipscore on 1 of 1" in text
    assert f"| model | {columns} | Average, by its rule | Average, as printed |" in text
    assert "| Aes Teacher | 0.49 | 0.59 | 24.02 | 0.295 | 0.346 | 6.22 | 1.498 | 3.48 | 0.857 | 0.698 |" in text
    assert "40 steps of the first-order ODE, 512 px, bfloat16, seed 42; base them/base." in text
    assert summary["reference"]["average"]["Cascade NFT"] == pytest.approx(0.934, abs=5e-4)
