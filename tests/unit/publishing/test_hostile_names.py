# SPDX-License-Identifier: Apache-2.0
"""Names, prompts and texts of others stay text: they make no link, tag, line, file or front matter."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.support.cards import COMMIT, assert_reads_well, example_record
from trl_diffusion_opd.hub.licenses import License
from trl_diffusion_opd.hub.locations import Origin
from trl_diffusion_opd.publishing.card import render_card
from trl_diffusion_opd.publishing.record import BenchmarkScore, GalleryImage, PromptSet, RunRecord, TeacherRecord
from trl_diffusion_opd.publishing.space_content import SpaceContent, _folder_names
from trl_diffusion_opd.utils.markdown import code, escape, fenced, hyperlink, table


HOSTILE = [
    "x](javascript:alert(1)) [y",
    "![i](https://evil/i.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "line\n\n# Heading\n\n---\nlicense: none\n---\n",
    "``` \n```python\nimport os",
    "back`tick` and `one",
    "**bold** _x_ ~~no~~ $$y$$ &lt;b&gt;",
    "---",
    "../../../esc",
    '"); import os; ("',
    "{{ 7 * 7 }} {% raw %}",
]


def without_code(text: str) -> str:
    return re.sub(r"(?<!\\)`[^`\n]+`", "", re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", text))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name):
    results = {"base": {name: 0.1}, "teachers": {name: {name: 0.9}}, "student": {name: 0.5}}
    sets = [PromptSet(name, Origin(name), 40, 64, 1, [name])]
    record = example_record(
        name=name,
        teachers=[TeacherRecord(name, Origin(name), 1.0, "ab" * 32)],
        prompts=sets,
        eval_prompts=sets,
        base=Origin(name),
        repo_id=None,
        base_license=License("other", name, f"javascript:{name}"),
        settings={"task_weights": {name: 2}, "note": name},
        gallery=[GalleryImage(name, "images/ocr_0.png", name, 7, 300)],
        results=results,
        reward_names={name: [name, "other"]},
        reward_docs={name: name, "other": name},
        benchmarks=[BenchmarkScore(name, name, "x", 0.5, Origin(name), 64, 0, {name: 0.4})],
        benchmark_settings={"num_inference_steps": 1, "resolution": 8, "guidance_scale": 1.0},
    )
    plain = example_record(
        **{field: getattr(record, field) for field in ("repo_id", "benchmark_settings")},
        base=Origin("n"),
        base_license=License("other", "n", "javascript:n"),
        name="n",
        teachers=[TeacherRecord("n", Origin("n"), 1.0, "ab" * 32)],
        prompts=[PromptSet("n", Origin("n"), 40, 64, 1, ["n"])],
        eval_prompts=[PromptSet("n", Origin("n"), 40, 64, 1, ["n"])],
        settings={"task_weights": {"n": 2}, "note": "n"},
        gallery=[GalleryImage("n", "images/ocr_0.png", "n", 7, 300)],
        results={"base": {"n": 0.1}, "teachers": {"n": {"n": 0.9}}, "student": {"n": 0.5}},
        reward_names={"n": ["n", "other"]},
        reward_docs={"n": "n", "other": "n"},
        benchmarks=[BenchmarkScore("n", "n", "x", 0.5, Origin("n"), 64, 0, {"n": 0.4})],
    )
    card, same = str(render_card(record)), str(render_card(plain))

    # The front matter is one block, with the same keys.
    front, expected = (yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n")) for text in (card, same))
    assert front.keys() == expected.keys() and front["license_name"] == name
    assert ModelCard(card).data.to_dict()["tags"] == ModelCard(same).data.to_dict()["tags"]
    # The body has the lines of a harmless one: the same headings, tables and fences.
    body, harmless = (without_code(ModelCard(text).text) for text in (card, same))
    for pattern in (
        r"(?m)^#+ ",
        r"(?m)^\|",
        r"(?m)^-",
        r"(?m)^>",
        "\n\n",
        r"(?<![\\!])\[",
        r"!\[",
        r"(?<!\\)\]\(",
        "(?<!\\\\)`",
    ):
        assert len(re.findall(pattern, body)) == len(re.findall(pattern, harmless)), pattern
    assert "<script" not in body and "<img" not in body and not re.search(r"(?<!\\)\]\(javascript:", body)
    assert [line.count(" | ") for line in body.splitlines() if line.startswith("|")] == [
        line.count(" | ") for line in harmless.splitlines() if line.startswith("|")
    ]
    settings = re.search(r"(?ms)^(`{3,})yaml\n(.*?)^\1$", ModelCard(card).text)
    assert yaml.safe_load(settings[2]) == record.settings
    # The code is Python that says the same.
    code_lines = re.search(r"(?ms)^```python\n(.*?)^```$", card)[1]
    compile(code_lines, "snippet", "exec")
    assert repr(name) in code_lines and json.dumps(f"./{name}", ensure_ascii=False) in code_lines


def test_plain_names_are_not_touched():
    for text in ("ocr", "geneval_counting", "a/teachers/ocr@v1", "1 if it can be read.", "x-1.0", "It's (one), 2!"):
        assert escape(text) == text
    assert escape("uses `metadata` of <b>") == "uses `metadata` of &lt;b&gt;"
    assert escape("_x_ * [y] `z") == r"\_x\_ \* \[y\] \`z"
    assert [escape(text) for text in ("# a", "- a", "1. a", "12) a", "---")] == [
        r"\# a",
        r"\- a",
        r"1\. a",
        r"12\) a",
        r"\---",
    ]
    assert code("a`b\nc") == "`a b c`" and code("``") == "` `"
    assert fenced("a\n```\nb", "yaml") == "````yaml\na\n```\nb\n````"
    assert hyperlink("a]b", "https://x.y/z)(") == r"[a\]b](https://x.y/z%29%28)"
    assert hyperlink("a", "javascript:alert(1)") == "a"
    assert table([escape("a|b")], [[escape("c\nd")]]) == "| a&#124;b |\n| --- |\n| c d |"


def test_tasks_become_folders_of_their_own():
    tasks = ["ocr", "../../../esc", "/etc", "", "a b", "a/b", "a?b", "ocr_0", "x" * 300, ".."]
    names = _folder_names(tasks)
    assert names["ocr"] == "ocr" and len(set(names.values())) == len(tasks)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,45}", name) for name in names.values()), names
    assert "models" in vars(SpaceContent)


def test_the_pipeline_of_the_record_is_the_one_of_the_snippet(tmp_path):
    card = str(render_card(example_record()))
    assert "from diffusers import StableDiffusion3Pipeline\n" in card
    assert "    prompt='a \"red\" cat | dog',\n" in card
    card = str(render_card(example_record(pipeline_class="FluxPipeline")))
    assert "from diffusers import FluxPipeline\n" in card and "pipe = FluxPipeline.from_pretrained(" in card
    assert "StableDiffusion3Pipeline" not in card
    assert_reads_well(card)

    example_record().save(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    del content["pipeline_class"], content["has_no_effect"]  # as an older version wrote it
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert RunRecord.load(tmp_path) == example_record()
    (tmp_path / "run.json").write_text(json.dumps({**content, "pipeline_class": "X; import os"}))
    with pytest.raises(ValueError, match="`pipeline_class` is no name of a class: 'X; import os'"):
        RunRecord.load(tmp_path)


def test_scores_that_nobody_can_check_are_not_in_the_index():
    def score(origin, num_images):
        return BenchmarkScore("DrawBench", "CLIP", "clipscore", 0.5, origin, num_images)

    public, local = Origin("a/b", "a/b", COMMIT, "dataset"), Origin("me/prompts.txt", repo_type="dataset")
    address = Origin("https://x.y/data/prompts.txt", repo_type="dataset")
    settings = {"num_inference_steps": 1, "resolution": 8, "guidance_scale": 1.0}
    for origin, number, expected in (
        (public, 30, [("a/b", "DrawBench")]),
        (public, 29, []),
        (address, 30, [("DrawBench", "DrawBench")]),
        (local, 1000, []),
    ):
        record = example_record(results={}, benchmarks=[score(origin, number)], benchmark_settings=settings)
        found = render_card(record).data.to_dict().get("model-index", [{"results": []}])
        names = [(row["dataset"]["type"], row["dataset"]["name"]) for row in found[0]["results"]]
        assert names == expected, origin
        assert "| DrawBench | CLIP |" in str(render_card(record))  # people may read it
    few = [PromptSet(t, Origin("me/held", "me/held", COMMIT, "dataset"), 1, 1, 0) for t in ("ocr", "scene")]
    assert "model-index" not in str(render_card(example_record(eval_prompts=few)))


def test_what_changes_nothing_or_compares_with_nothing_is_said():
    card = str(render_card(example_record(has_no_effect=True)))
    assert "**It has no effect: all its weights are zero**" in card
    assert "has no effect" not in str(render_card(example_record()))
    for names, expected in ((["unifiedreward"], True), (["pickscore", "UnifiedReward"], True), (["ocr"], False)):
        card = str(render_card(example_record(reward_names={"ocr": names, "scene": ["pretty"]})))
        assert ("cannot be compared with published ones" in card) == expected
