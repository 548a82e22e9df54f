"""The report in a real browser: Chromium opens it from disk, a user sorts, filters, hovers, compares; nothing is fetched.

Needs Chromium (Debian: `apt-get install chromium`; or CHROMIUM=/path/to/it) and `pip install playwright`; skips without.
REPORT_SCREENSHOTS=<folder> keeps pictures of it at 1280 px, on a phone and in dark mode."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from lra.html_report import render
from lra.html_report_entries import gather
from lra.ledger import Ledger
from tests.lra.synthetic import make_ledger, make_record

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
if not Path(CHROMIUM).exists():
    pytest.skip("no Chromium: apt-get install chromium, or CHROMIUM=/path/to/chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A made-up ledger with everything that the page can show."""
    folder = tmp_path_factory.mktemp("report")
    runs = folder / "runs"
    make_ledger(runs, ["softmax", "performer", "schoenbat_exp", "skyformer", "mean_pool"])
    for record in (
        make_record("listops", "softmax", 7, accuracy=0.6, gpu="NVIDIA H200", experiment="accuracy", protocol="skyformer", source="official", speed=900.0),
        make_record("listops", "informer", 0, status="oom"),
        make_record("listops", "performer", 0, overrides=["attention.feature_map.num_features=256"], identity={"attention": {"num_features": 256}}),
    ):  # fmt: skip
        Ledger(runs).write(record)
    (runs / "ledger" / "broken.json").write_text("{")
    study = runs / "studies" / "made_up_study"
    study.mkdir(parents=True)
    figure, axes = plt.subplots(figsize=(4, 2))
    axes.plot(np.arange(5))
    figure.savefig(study / "error.png")
    plt.close(figure)
    path = folder / "report.html"
    path.write_text(render(gather([runs])))
    return path


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, report):
    """Open the report; at the end no error may have been logged and nothing but the file itself requested."""
    contexts, problems, requests = [], [], []

    def open_it(width=1280, height=900, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on(
            "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready=true]", timeout=60_000)
        page.wait_for_selector("#scatter .points path")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []
    assert set(requests) <= {report.as_uri()}


def names(page, table="#accuracy-table"):
    return page.eval_on_selector_all(f"{table} tbody th", "cells => cells.map(cell => cell.firstChild.textContent)")


def test_a_header_sorts_upwards_and_downwards(open_page):
    page = open_page()
    assert names(page) == sorted(names(page))
    header = page.locator("#accuracy-table thead button", has_text="image (generated)")
    header.click()
    figures = page.eval_on_selector_all(
        "#accuracy-table tbody tr",
        """(rows, place) => rows.map(row => parseFloat(row.children[place].textContent)).filter(Number.isFinite)""",
        page.eval_on_selector_all(
            "#accuracy-table thead th", "heads => heads.findIndex(h => h.textContent.startsWith('image'))"
        ),
    )
    assert len(figures) == 5 and figures == sorted(figures, reverse=True)
    page.keyboard.press("Enter")  # the header still has the focus
    assert page.locator("#accuracy-table th[aria-sort=ascending]").inner_text().startswith("image")


def test_each_filter_acts_and_reset_undoes_it(open_page):
    page = open_page()
    everything = names(page)
    page.select_option("#filter-hardware", "NVIDIA H200")
    assert names(page) == ["softmax"]
    assert page.locator("#runs tbody tr").count() == 1
    page.click("#reset")
    assert names(page) == everything
    page.select_option("#filter-task", "image")
    assert page.locator("#accuracy-table thead th").count() == 3  # attention, image, average
    page.click("#reset")
    page.select_option("#filter-source", "official")
    assert names(page) == ["softmax"]
    page.click("#reset")
    page.select_option("#filter-experiment", "accuracy")
    assert names(page) == ["softmax"]
    page.select_option("#filter-protocol", "quick")
    assert "No run matches" in page.locator("#accuracy-table").inner_text()


def test_parts_of_names_choose_attentions_in_every_part_of_the_page(open_page):
    page = open_page()
    everything = names(page)
    page.fill("#filter-attention", "soft, schoenbat")
    assert set(names(page)) == {"softmax", "schoenbat_exp"}
    for chart in ("scatter", "lengths", "curves"):
        drawn = page.eval_on_selector_all(f"#{chart} .legendtext", "texts => texts.map(one => one.textContent)")
        assert drawn and all("softmax" in text or "schoenbat_exp" in text for text in drawn), chart
    assert page.locator("#ranks .ytick").count() == 2
    assert {"schoenbat_exp"} < set(names(page, "#pairs"))  # softmax is the reference of all
    page.fill("#filter-attention", "schoenbat")
    assert set(names(page, "#pairs")) == {"schoenbat_exp"}
    page.fill("#filter-attention", "nonsense")
    assert "No run matches" in page.locator("#accuracy-table").inner_text()
    assert "No attention with a rank" in page.locator("#ranks").inner_text()
    assert "No comparison matches" in page.locator("#pairs").inner_text()
    page.click("#reset")
    assert names(page) == everything


def test_what_most_rows_share_is_not_marked_as_best(open_page):
    page = open_page()
    marked = page.evaluate(
        """() => [[1, 2, 2, 3], [2, 2, 1], [1, 2], [4]].map(means =>
             bestOf(means.map(mean => ({ row: ["a", "quick"], cells: { text: { mean } } })), [{ name: "text" }]).size)"""
    )
    assert marked == [1, 0, 1, 0]
    assert page.locator("#accuracy-table .best").count() >= 5


def test_of_many_attentions_the_chart_of_lengths_draws_few(open_page):
    page = open_page()
    assert page.locator("#lengths-words").inner_text() == ""
    kept = page.evaluate(
        """() => { const rows = [];
          const row = (attention, length, train, hardware = "CPU") => rows.push({ attention, length, train, hardware });
          for (let i = 0; i < 30; i += 1) for (const length of [100, 200]) row(i ? `a${i}` : "softmax", length, i);
          row("short", 100, 1); row("far", 100, 1); row("far", 400, 1);
          for (const hardware of ["CPU", "GPU"]) row("two machines", hardware === "CPU" ? 100 : 900, 1, hardware);
          const few = fewLines(rows, "train");
          return [[...new Set(few.lines.map(line => line[0].attention))], few.shown, few.left, few.softmax]; }"""
    )
    assert set(kept[0]) == {"softmax", "far", *(f"a{i}" for i in range(22, 30))}
    assert kept[1:] == [10, 21, 1]


def test_a_cell_leads_to_its_runs_and_the_command_that_repeats_them(open_page):
    page = open_page()
    page.locator("#accuracy-table button.cell", has_text="n 3").first.click()
    text = page.locator("dialog").inner_text()
    assert text.count("Run it again") == 3 and "python run.py experiment=quick task=" in text and "/ledger/" in text
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


def test_published_figures_stand_beside_ours_with_their_footnotes(open_page):
    page = open_page()
    page.select_option("#paper", "skyformer")
    published = page.locator("tr.published")
    assert published.count() == 5  # softmax twice, performer, informer, skyformer; a variant has no counterpart
    assert "38.02" in published.filter(has_text="Performer").inner_text()
    assert "NOT COMPARABLE" in page.locator("#footnotes").inner_text()
    page.select_option("#filter-protocol", "skyformer")
    assert "NOT COMPARABLE" not in page.locator("#footnotes").inner_text()
    assert "ListOps without brackets" in page.locator("#footnotes").inner_text()


def test_hovering_a_point_shows_run_configuration_and_commit(open_page):
    page = open_page()
    page.locator("#scatter").scroll_into_view_if_needed()
    page.locator("#scatter .points path").first.hover(force=True)
    label = page.locator("#scatter .hoverlayer .hovertext")
    label.first.wait_for()
    text = label.first.text_content()
    assert "examples/s" in text and "run " in text and "commit 0123456789ab" in text


def test_curves_follow_the_chosen_runs(open_page):
    page = open_page()
    page.select_option("#curves-column", "image (generated)")
    assert page.locator("#curves .scatterlayer .trace").count() == 5
    values = page.eval_on_selector_all(
        "#curves-runs option", "options => options.slice(0, 2).map(option => option.value)"
    )
    page.select_option("#curves-runs", values)
    assert page.locator("#curves .scatterlayer .trace").count() == 2
    page.select_option("#curves-kind", "loss")
    assert "training loss" in page.locator("#curves").inner_text()


def test_two_runs_are_compared_setting_by_setting(open_page):
    page = open_page()
    page.fill("#search", "performer listops")
    page.locator("#runs button[aria-label$='run A']").first.click()
    page.fill("#search", "H200")
    page.locator("#runs button[aria-label$='run B']").first.click()
    text = page.locator("#difference").inner_text()
    assert "settings differ" in text and "protocol.name" in text and "hardware" in text
    page.fill("#run-b", "nonsense")
    assert "No run is called nonsense" in page.locator("#difference").inner_text()


def test_lengths_ranks_pairs_and_studies_are_there(open_page):
    page = open_page()
    assert page.locator("#lengths .scatterlayer .trace").count() >= 5
    assert "Friedman" in page.locator("#ranks-words").inner_text()
    assert page.locator("#pairs tbody tr").count() >= 20
    image = page.locator("#figures img")
    assert image.get_attribute("alt") == "Figure of the study made_up_study: error"
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    assert "1 file left out" in page.locator("header").inner_text()


def test_every_chart_image_and_control_has_a_name(open_page):
    page = open_page()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("select, input, button, img, .chart, dialog[open]")].filter(one =>
             !one.closest(".plot-container, .modebar") && !one.labels?.length && !one.textContent.trim() &&
             !one.getAttribute("aria-label") && !one.getAttribute("alt")).map(one => one.outerHTML.slice(0, 99))"""
    )
    assert nameless == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (1280, "dark")])
def test_nothing_overflows_and_colours_follow_the_system(open_page, width, scheme):
    page = open_page(width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 27)" if scheme == "dark" else "rgb(255, 255, 255)")
    plot = page.locator("#scatter .main-svg").first.evaluate("plot => plot.style.background")
    assert plot.replace(" ", "") in background.replace(" ", "") or plot == background
    folder = os.environ.get("REPORT_SCREENSHOTS")
    if folder:
        page.select_option("#paper", "skyformer")
        page.screenshot(path=f"{folder}/report_{width}_{scheme}.png", full_page=True)
