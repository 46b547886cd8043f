# SPDX-License-Identifier: Apache-2.0
"""What the tables and pages of an evaluation say: titles, notes, and text that is not markup."""

from html import unescape

import pytest

from tests.support.benchmark_world import synthetic_results
from trl_diffusion_opd.evaluation.benchmark.average import paper_table
from trl_diffusion_opd.evaluation.benchmark.pages import gallery_page, summary_page
from trl_diffusion_opd.evaluation.benchmark.report import write_report
from trl_diffusion_opd.evaluation.benchmark.tables import UNIFIED_REWARD_NOTE, Table, make_tables


FULL = paper_table().rows["DiffusionOPD"]
ODD = "a <script>alert('1')</script> & \"b\""
SAFE = "a &lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; &#34;b&#34;"


@pytest.mark.parametrize(
    ("scores", "noted"),
    [(FULL, True), ({"UnifiedReward": 3.5}, True), ({k: v for k, v in FULL.items() if k != "UnifiedReward"}, False)],
    ids=["all", "alone", "without"],
)
def test_where_unifiedreward_is_shown_its_scores_are_said_not_to_compare(tmp_path, scores, noted):
    write_report(synthetic_results(tmp_path, {"student": scores}))
    markdown, html = (tmp_path / "table.md").read_text(), unescape((tmp_path / "index.html").read_text())
    assert "not with published ones" in UNIFIED_REWARD_NOTE
    assert markdown.count(UNIFIED_REWARD_NOTE) == html.count(UNIFIED_REWARD_NOTE) == noted
    averaged = "UnifiedReward is one of them, so compare it with the paper's with care."
    assert (averaged in markdown) == (averaged in html) == (scores == FULL)


def result(benchmark: str, reward: str, built_in: bool) -> dict:
    counts = {"num_images": 2, "num_scored": 2, "num_failed": 0, "standard_error": 0.1, "value": 0.5}
    return {"model": "base", "benchmark": benchmark, "reward": reward, "built_in": built_in, **counts}


def test_benchmarks_share_a_table_by_what_is_before_the_comma_of_their_titles():
    titles = {"x_one": "Mine, first", "x_two": "Mine, second", "three": "Other"}
    results = [result(name, "sharpness", False) for name in titles]
    results += [result("x_one", "unifiedreward", True), result("three", "unifiedreward", False)]
    settings = {
        "models": {"base": {"origins": [], "guidance_scale": 1.0}},
        "benchmarks": {name: {"title": title} for name, title in titles.items()},
        "base": {"origin": {"name": "them/base"}},
        **{"num_inference_steps": 4, "resolution": 8, "dtype": "float32", "seed": 0},
    }
    summary = {"settings": settings, "results": results, "statistics": []}
    summary |= {"table": {"base": {}}, "average": {"base": None}}
    mine, other, _ = make_tables(summary)
    assert (mine.title, mine.header) == (
        "Mine",
        ["model", "first: sharpness", "second: sharpness", "UnifiedReward"],
    )
    assert UNIFIED_REWARD_NOTE in mine.notes
    settings["benchmarks"]["x_one"]["title"] = "Mine"
    alone = {**summary, "results": [result("x_one", "hpsv3", True), result("x_one", "hpsv2", True)]}
    assert make_tables(alone)[0].header == ["model", "HPSv3", "HPSv2.1"]
    # A function of one's own that is called so is another reward.
    assert other.header == ["model", "sharpness", "unifiedreward"] and UNIFIED_REWARD_NOTE not in other.notes


def test_names_prompts_and_notes_are_no_markup():
    settings = {"resolution": 16, "benchmarks": {"a+b ü": {"title": ODD}}}
    page = summary_page(settings, [Table(ODD, ["model", ODD], [[ODD, "1"]], [ODD])])
    assert page.count(SAFE) == 5 and "<script" not in page and '<a href="a%2Bb%20%C3%BC.html">' in page
    image = {"file_name": "x, y#?/a/00012.png", "model": ODD, "prompt": ODD, "seed": 5}
    rows = [{**image, "scores": {ODD: None, "b": 0.12345}}, {**image, "scores": {}}]
    page = gallery_page(settings, "a+b ü", rows)
    assert page.count(SAFE) == 2 + 1 + 2 * 3 + 1 and "<script" not in page  # title, prompt, images, name of a reward
    assert f'src="x%2C%20y%23%3F/a/00012.png" width="16" height="16" alt="{SAFE}: {SAFE}"' in page
    assert "<small>12, seed 5</small>" in page and f"</b> {SAFE} –, b 0.123</figcaption>" in page
    assert ' class="small" style="max-width: 32rem"' in page
    assert "class=" not in gallery_page({**settings, "resolution": 512}, "a+b ü", []).partition("<body>")[2]
