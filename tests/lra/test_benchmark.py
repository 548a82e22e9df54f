"""The benchmark's numbers are what their labels say: paired ratios, exponents, limits, regressions, the whole job once."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lra.benchmark_tables import figures_table, regressions, scaling_figure, scaling_table
from lra.benchmark_timing import OutOfMemory, Times, exponent, figure, interleaved, memory_limit, peak_memory, ratio

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def run(*arguments: str, runs: Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "run.py", "job=benchmark", "threads=1", f"paths.runs={runs}", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=250, check=False)


def test_a_ratio_is_taken_between_neighbours_in_time() -> None:
    """A machine that gets ten times slower half way changes both alike: the ratio of medians would be off."""
    slow = Times(wall=(2.0, 20.0, 2.0), cpu=(2.0, 2.2, 2.1))
    fast = Times(wall=(1.0, 10.0, 1.0), cpu=(1.0, 1.3, 1.2))
    assert ratio(slow, fast) == {"value": 2.0, "q25": 2.0, "q75": 2.0, "by_cpu_time": 2.0}


def test_works_are_run_in_turn_after_their_warm_up() -> None:
    order: list[str] = []
    times = interleaved(
        {name: lambda name=name: order.append(name) for name in "ab"}, warmup=1, repetitions=3, device=CPU
    )
    assert order == list("abababab")
    assert times["a"].summary()["repetitions"] == 3


def test_an_exponent_is_the_slope_of_a_power_law() -> None:
    assert exponent([1024, 2048, 4096], [3 * n**1.7 for n in (1024, 2048, 4096)]) == pytest.approx(1.7)
    assert exponent([1024], [1.0]) is None


@pytest.mark.parametrize(("better", "value", "reached"), [("higher", 8.0, True), ("higher", 7.9, False), ("lower", 8.0, True), ("lower", 8.1, False)])  # fmt: skip
def test_a_figure_knows_whether_it_is_reached(better: str, value: float, reached: bool) -> None:
    assert figure("f", value, better=better, reach=8.0)["reached"] is reached


def test_a_figure_that_was_not_run_is_a_dash_with_its_reason() -> None:
    row = figure("f", None, better="higher", reach=8.0, note="not run: no GPU here")
    assert row["reached"] is None
    text = figures_table([row], []).markdown()
    assert "not run: no GPU here" in text
    assert "nan" not in text.lower()
    assert " 0 " not in text


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def work() -> None:
        a = torch.empty(1_000_000)
        b = torch.empty(1_000_000)
        del a, b
        torch.empty(500_000)

    assert peak_memory(work, CPU) == pytest.approx(8_000_000, rel=0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is set through Linux' address space")
def test_work_beyond_the_memory_limit_is_out_of_memory_and_the_limit_is_lifted_again() -> None:
    with pytest.raises(OutOfMemory), memory_limit(0.5, CPU):
        torch.ones(2**28)
    torch.ones(2**28)
    with pytest.raises(RuntimeError, match="must match"), memory_limit(0.5, CPU):
        torch.ones(3) + torch.ones(4)


def rows() -> list[dict]:
    measured = [
        {"part": "scaling", "subject": name, "length": n, "batch_size": 1, "status": "measured",
         "wall_median": 1e-6 * n**power, "peak_memory_bytes": 100 * n}
        for name, power in (("linear", 1), ("exact", 2)) for n in (1024, 2048, 4096)
    ]  # fmt: skip
    measured[-1] = {key: measured[-1][key] for key in ("part", "subject", "length", "batch_size")} | {"status": "oom"}
    return measured


def test_the_scaling_table_shows_memory_that_ran_out_and_the_exponents() -> None:
    cells = scaling_table(rows(), [], "wall_median").cells
    assert list(cells.columns[:3]) == ["steps/s 1k", "steps/s 2k", "steps/s 4k"]
    assert cells.loc["exact", "steps/s 4k"] == cells.loc["exact", "GB 4k"] == "OOM"
    assert cells.loc["linear", "steps/s 4k"] == "244"
    assert (cells.loc["linear", "time ~ L^"], cells.loc["exact", "time ~ L^"]) == ("1.00", "2.00")


def test_the_scaling_figure_states_the_exponents() -> None:
    legends = [text.get_text() for axis in scaling_figure(rows(), ["linear", "exact"], "wall_median").axes for text in axis.get_legend().texts]  # fmt: skip
    assert legends == ["linear: L^1.00", "exact: L^2.00", "linear: L^1.00", "exact: L^1.00"]


def record(value: float, better: str, spread: float = 0.01) -> dict:
    quartiles = {"value": value, "q25": value * (1 - spread), "q75": value * (1 + spread), "by_cpu_time": value}
    occasion = {"hardware": {"cpu": "a"}, "software": {"torch": "2"}}
    row = figure("f", quartiles, better=better, reach=None)
    return {"name": f"r{value}", "occasion": occasion, "settings": {}, "figures": [row]}


@pytest.mark.parametrize(
    ("better", "before", "now", "spread", "worse"),
    [
        ("higher", 10.0, 8.0, 0.01, True),
        ("higher", 10.0, 12.0, 0.01, False),
        ("lower", 10.0, 12.0, 0.01, True),
        ("lower", 10.0, 8.0, 0.01, False),
        ("higher", 10.0, 9.5, 0.01, False),  # within the tolerance
        ("higher", 10.0, 8.0, 0.2, False),  # the quartiles overlap: noise
    ],
)
def test_a_regression_is_worse_than_the_tolerance_and_than_the_noise(better, before, now, spread, worse) -> None:
    table, names = regressions(record(now, better, spread), record(before, better, spread), 0.1)
    assert names == (["f"] if worse else [])
    assert table.cells.loc["f", "verdict"] == ("worse" if worse else "as before or better")


def test_a_comparison_says_when_the_machine_was_another() -> None:
    old, new = record(10.0, "higher"), record(10.0, "higher")
    new["occasion"]["hardware"] = {"cpu": "b"}
    assert "the two records differ in hardware" in regressions(new, old, 0.1)[0].notes


def test_freed_memory_is_reused_without_page_faults() -> None:
    code = """
import resource, torch
from lra.allocator import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        pieces = [torch.ones(1_000_000) for _ in range(4)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
loose = faults()
if keep_freed_memory():
    faults(); print(loose, faults())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    if not done.stdout:
        pytest.skip("no glibc here")
    loose, kept = map(int, done.stdout.split())
    assert kept < 100 < loose


def test_a_run_leaves_no_freed_memory_behind() -> None:
    code = """
import resource, torch
from pathlib import Path
from lra.allocator import freed_memory_kept
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
with freed_memory_kept() as kept:
    before = resident()
    pieces = [torch.ones(1_000_000) for _ in range(50)]
    last = torch.ones(1_000_000)  # above them on the heap
    del pieces
    held = resident() - before
if kept:
    print(held, resident() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    if not done.stdout:
        pytest.skip("no glibc here")
    within, after = map(float, done.stdout.split())
    assert within > 150
    assert after < 50


def test_the_job_writes_a_record_that_can_be_compared(tmp_path: Path) -> None:
    sizes = ("benchmark=smoke", "task=listops", "benchmark.layer.length=64", "benchmark.layer.crossover=[32]", "benchmark.parts=[layer,scaling]")  # fmt: skip
    done = run(*sizes, runs=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "benchmark").glob("*.json")
    found = json.loads(path.read_text())
    assert found["threads"]["torch"] == 1
    assert found["occasion"]["hardware"]["cpu"]
    assert "MKL" in found["build"] or "BLAS" in found["build"]
    assert {row["figure"]: row["value"] for row in found["figures"]}["forward at L=64, softmax over schoenbat"] > 0
    unmeasured = [row for row in found["figures"] if row["value"] is None]
    assert all(row["note"] for row in unmeasured), "a figure without a value says why"
    assert {row["subject"] for row in found["rows"] if row["part"] == "scaling"} == {"softmax", "schoenbat_exp"}
    assert {p.suffix for p in path.parent.iterdir()} == {".json", ".csv", ".md", ".png", ".pdf"}

    worse = copy.deepcopy(found)
    row = worse["figures"][0]
    row.update(value=row["value"] / 10, q25=row["q25"] / 10, q75=row["q75"] / 10)
    (path.parent / "worse.json").write_text(json.dumps(worse))
    done = run(f"compare=[{path.stem},worse]", runs=tmp_path)
    assert done.returncode == 1
    assert "1 figures got worse: forward at L=64, softmax over schoenbat" in done.stderr
    assert run(f"compare=[worse,{path.stem}]", runs=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare=[nosuch,other]"], "compare=nosuch: no such record"),
        (["benchmark.parts=[layers]"], "choose from layer, loop, scaling"),
        (["benchmark.parts=[scaling]", "benchmark.scaling.attentions=[sofmax]"], "names sofmax, which conf/attention/ does not hold"),
        (["compile=default"], "job=benchmark measures what is not compiled; leave it out"),
    ],
)  # fmt: skip
def test_what_is_typed_wrong_is_answered_with_the_choices(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*arguments, runs=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
