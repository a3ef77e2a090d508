"""Reports: what the file holds, and how it behaves in a real browser."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from rpcompile.gantt import bars, palette
from rpcompile.ir import ClassCost, Op
from rpcompile.plan import Plan
from rpcompile.report import timeline, write_report
from rpcompile.report.write import report_html
from rpcompile.simulate import MemorySteps
from tests.chains import chain, partition
from tests.chromium import Page, needs_chromium
from tests.test_plan import plan_of


def small() -> Plan:
    plan = plan_of((chain(6), partition("F0-1", "F2-3", "FB4-5", "B2-3", "B0-1"), 2, 3, "sync"))
    classes = (ClassCost("attention", 1, 2, 3, 4, 0.5, 1.0), ClassCost("matmul", 5, 6, 7, 8, 2.0, 4.0))
    return replace(plan, chain=replace(plan.chain, op_classes=classes), model_name="Toy <&> model")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(small(), path)
    return path


def test_file_is_one_page_without_links(written: Path) -> None:
    text = written.read_text()
    assert "Toy &lt;&amp;&gt; model on 2 x toy" in text
    assert not re.findall(r"<!--\w+-->", text)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']http", text)
    assert "The plan in words" in text
    for stage in range(5):
        assert f"Stage {stage} (" in text
    assert len(text) < 3_000_000


def test_a_profile_has_no_classes_and_the_report_says_so() -> None:
    plan = replace(small(), chain=replace(small().chain, op_classes=()))
    text = report_html(plan, compare=False)
    assert "made from a profile, which has no classes" in text
    assert "Not asked for." in text


def test_a_bar_for_every_action_that_takes_time_until_there_are_too_many() -> None:
    plan = small()
    simulated = plan.simulate()
    every = bars(plan.schedule, simulated)
    counted = [action for action in plan.schedule.actions() if action.op is not Op.FREE]
    assert sorted(bar.label for bar in every) == sorted(action.id for action in counted)
    fewer = bars(plan.schedule, simulated, most=len(every) - 1)
    assert len(fewer) < len(every)
    assert sum(bar.count for bar in fewer) == len(every)
    assert sum(bar.nbytes for bar in fewer) == sum(bar.nbytes for bar in every)
    assert {b.label for b in fewer} >= {a.id for a in counted if a.op is Op.FUSED}
    fewest = bars(plan.schedule, simulated, most=1)
    assert sum(bar.count for bar in fewest) == len(every)
    assert len(fewest) < len(fewer)


def test_neighbouring_microbatches_differ_in_grayscale() -> None:
    gray = [0.30 * red + 0.59 * green + 0.11 * blue for red, green, blue in palette(64)]
    assert all(abs(one - two) > 0.03 for one, two in pairwise(gray))


def test_thinned_memory_keeps_the_peak() -> None:
    count = 10 * timeline.MOST_STEPS
    steps = MemorySteps(
        tuple(map(float, range(count))), tuple(999 if i == 777 else i % 5 for i in range(count))
    )
    times, nbytes = timeline.thinned(steps, float(count))
    assert len(times) == len(nbytes) <= timeline.MOST_STEPS + 1
    assert max(nbytes) == 999
    assert times == sorted(times)


# ------------------------------------------------------------------- in a browser

BARS = 'Bokeh.documents[0].get_model_by_name("bars")'
PLACE = f"""(() => {{
  const bars = {BARS}, view = Bokeh.index.find_one(bars), plot = view.parent;
  const data = bars.data_source.data, i = data.label.indexOf("2FB1");
  const box = plot.canvas_view.el.getBoundingClientRect();
  const x = plot.frame.x_scale.compute((data.left[i] + data.right[i]) / 2);
  const y = plot.frame.y_scale.compute(data.y[i]);
  return [box.x + x, box.y + y];
}})()"""
TIPS = """(() => {
  const found = [], visit = (root) => { for (const node of root.querySelectorAll("*")) {
    if (node.classList.contains("tip")) found.push(node.textContent);
    if (node.shadowRoot) visit(node.shadowRoot); } };
  visit(document); return found.join("|"); })()"""


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(written: Path, dark: bool, tmp_path: Path) -> None:
    with Page(dark) as page:
        page.open(written)
        assert page.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
        page.run('document.querySelectorAll(".panel")[1].scrollIntoView()')
        plan = small()
        assert page.run(f"{BARS}.data_source.data.label.length") == len(bars(plan.schedule, plan.simulate()))
        assert page.run('Bokeh.documents[0].get_model_by_name("idle").data_source.data.gpu.length') > 0
        page.move(*page.run(PLACE))
        tip = page.run(TIPS)
        assert "2FB1" in tip
        assert "fused, stage 2, microbatch 1" in tip
        assert "10,000.000 ms" in tip
        axis = '[...Bokeh.documents[0].all_models].find((model) => model.type == "LinearAxis")'
        ink = f"{axis}.major_label_text_color"
        before = page.run(f"JSON.stringify({ink})")
        page.run("rpcompileTheme()")
        assert page.run("document.documentElement.dataset.theme") == ("light" if dark else "dark")
        assert page.run(f"JSON.stringify({ink})") != before
        page.screenshot(tmp_path / "report.png")
        assert (tmp_path / "report.png").stat().st_size > 20_000
        assert page.problems == []
        assert [url for url in page.requests if not url.startswith(("data:", "file:"))] == []


@needs_chromium
def test_ten_thousand_bars_open(tmp_path: Path) -> None:
    stages = partition(
        *(f"F{i}-{i}" for i in range(19)), "FB19-19", *(f"B{i}-{i}" for i in reversed(range(19)))
    )
    plan = plan_of((chain(20), stages, 8, 76, "sync"))
    path = tmp_path / "report.html"
    write_report(plan, path, compare=False)
    assert path.stat().st_size < 3_000_000
    with Page() as page:
        page.open(path)
        assert page.run(f"{BARS}.data_source.data.label.length") >= 10_000
        assert page.problems == []
