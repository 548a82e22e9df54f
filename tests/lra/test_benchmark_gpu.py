"""The GPU benchmark measures what its rows say; here on a CPU, at tiny sizes, with the plain arithmetic underneath."""

from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from lra import benchmark_gpu
from lra.benchmark_gpu import GpuLayers, gpu_table, measure_cells, measure_gpu
from lra.benchmark_tables import figures_table, regressions

CONF = Path(__file__).resolve().parents[2] / "conf"
TINY = {
    "tokens": 128, "length": 64, "lengths": [32, 64], "copy_bytes": 4096, "repetitions": 2, "most_calls": 2,
    "seconds_per_repetition": 1e-4, "num_heads": 2, "head_dim": 8, "dtypes": ["fp32", "bf16"], "seconds": 100,
}  # fmt: skip


@pytest.fixture
def config() -> Iterator[DictConfig]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", ["job=benchmark"]).benchmark
        composed.gpu = OmegaConf.merge(composed.gpu, TINY)
        yield composed


def layers(config: DictConfig) -> GpuLayers:
    return GpuLayers(config, torch.device("cpu"), 0)


def test_without_a_gpu_the_table_says_so(config: DictConfig) -> None:
    (row,) = measure_gpu(layers(config))
    assert (row["value"], row["note"]) == (None, "not run: no GPU here")
    assert "fused op on a GPU over flash attention at L=64" in figures_table([row], []).markdown()


def test_every_length_type_and_pass_is_measured(config: DictConfig) -> None:
    measuring = layers(config)
    figures = measure_cells(measuring)
    found = {(row["dtype"], row["pass"], row["length"]) for row in measuring.rows if row["subject"] == "plus"}
    assert found == {(d, p, n) for d in ("bf16", "fp32") for p in ("forward", "training") for n in (32, 64)}
    for row in measuring.rows:
        elements = 128 * 2 * 8 * (2 if row["dtype"] == "bf16" else 4)
        assert row["bytes"] == elements * (4 if row["pass"] == "forward" else 8)
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["wall_median"])
        assert row["batch_size"] * row["length"] == 128
    by_name = {row["figure"]: row for row in figures}
    assert by_name["on a GPU, device copy, read and written"]["value"] > 0
    assert by_name["on a GPU, bf16 forward at L=64, plus: share of the copy's bandwidth"]["value"] > 0
    for row in figures:
        assert row["value"] is not None or row["note"], "a figure without a value says why"
    cells = gpu_table(measuring.rows, []).cells
    assert list(cells.columns) == ["ms 32", "ms 64", "of copy 32", "of copy 64"]
    settings = {"name": "a", "occasion": {"hardware": {}, "software": {}}, "settings": {}, "figures": figures}
    assert regressions(settings, settings, 0.1)[1] == []


def test_an_attention_that_cannot_run_is_left_out_with_its_reason(config: DictConfig, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(benchmark_gpu.functional, "scaled_dot_product_attention", refuse)
    figures = measure_cells(layers(config))
    ratios = [row for row in figures if " over " in row["figure"]]
    assert ratios and all(row["value"] is None and row["note"] for row in ratios)
    assert "No available kernel" in figures[0]["note"]
    assert any(row["value"] is not None for row in figures[1:])


def test_what_has_not_begun_in_time_is_named(config: DictConfig) -> None:
    config.gpu.seconds = -1
    measuring = layers(config)
    figures = measure_cells(measuring)
    assert measuring.rows == []
    assert "not run: fp32 forward at L=64, after -1 s" in figures[0]["note"]


@pytest.mark.parametrize(("seconds", "expected"), [(1e-6, 2), (1.0, 1)])
def test_calls_in_a_row_are_as_many_as_a_repetition_takes(
    config: DictConfig, monkeypatch: pytest.MonkeyPatch, seconds: float, expected: int
) -> None:
    monkeypatch.setattr(benchmark_gpu, "timed", lambda work, device: (seconds, seconds))
    calls: list[int] = []
    several, count = layers(config).repeated(lambda: calls.append(1))
    assert count == expected
    calls.clear()
    several()
    assert len(calls) == count
