"""Owns the benchmark as a job: what is measured, its record as JSON and CSV, its tables, and its comparison with another."""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from lra.allocator import keep_freed_memory
from lra.benchmark_gpu import GpuLayers, gpu_table, measure_gpu
from lra.benchmark_layer import Layers, measure_layer
from lra.benchmark_peers import measure_peers
from lra.benchmark_tables import figures_table, regressions, scaling_figure, scaling_table, time_of
from lra.benchmark_training import measure_loop, measure_scaling
from lra.display import say
from lra.experiment import choose_device
from lra.figures import save_figure
from lra.ledger import write_atomically
from lra.provenance import describe_occasion

_PARTS = ("layer", "loop", "scaling", "peers", "gpu")


def benchmark(config: DictConfig) -> None:
    """The job. `compare=<record>`: measure, then compare with that record; `compare=[<record>,<record>]`: compare only.
    Raises ValueError when a figure got worse, so that the command ends with exit code 1."""
    folder = Path(config.paths.runs) / "benchmark"
    named = [config.compare] if isinstance(config.compare, str) else list(config.compare or [])
    if len(named) > 2:
        raise ValueError(f"compare={named} names {len(named)} records; give one (measure, then compare) or two")
    others = [_read(folder, name) for name in named]
    if len(others) == 2:
        old, new = others
    else:
        new = _measure_and_write(config, folder)
        old = others[0] if others else None
    if old is None:
        return
    table, worse = regressions(new, old, config.benchmark.tolerance)
    print(table.markdown())
    if worse:
        raise ValueError(f"{len(worse)} figures got worse: {'; '.join(worse)}. Repeat on a quiet machine to be sure.")


def _measure_and_write(config: DictConfig, folder: Path) -> dict[str, Any]:
    unknown = [part for part in config.benchmark.parts if part not in _PARTS]
    if unknown or not config.benchmark.parts:
        raise ValueError(f"benchmark.parts={list(config.benchmark.parts)}; choose from {', '.join(_PARTS)}")
    if config.compile is not None:
        raise ValueError(
            f"compile={config.compile}: job=benchmark measures what is not compiled; leave it out. A run's own record holds "
            "its throughput, compiled where the run was: job=train compile=..."
        )
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    kept = config.benchmark.keep_freed_memory and keep_freed_memory()
    record = _record(config, device, kept)
    for part in config.benchmark.parts:
        rows, figures = _measure(part, config, device)
        record["rows"] += rows
        record["figures"] += figures
    record["figures"] += _left_out(config, device)
    _write(folder, record, config)
    return record


def _measure(part: str, config: DictConfig, device: torch.device) -> tuple[list[dict], list[dict]]:
    if part == "layer":
        layers = Layers(config.benchmark, device, config.seed)
        figures = measure_layer(layers)
        return layers.rows, figures
    if part == "gpu":
        on_gpu = GpuLayers(config.benchmark, device, config.seed)
        figures = measure_gpu(on_gpu)
        return on_gpu.rows, figures
    if part == "loop":
        return measure_loop(config, device)
    if part == "peers":
        return measure_peers(config, device)
    return measure_scaling(config, device), []


def _left_out(config: DictConfig, device: torch.device) -> list[dict[str, Any]]:
    """What the table holds and this command did not measure, with the reason."""
    rows = [dict(row) for row in OmegaConf.to_container(config.benchmark.not_run)]  # type: ignore[union-attr]
    blank = {"unit": "x", "reach": None, "value": None, "q25": None, "q75": None, "by_cpu_time": None, "reached": None}
    return [{**blank, "better": "higher", **row} for row in rows]


def _record(config: DictConfig, device: torch.device, kept: bool) -> dict[str, Any]:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    allocator = {
        key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "LD_PRELOAD", "KMP_", "OMP_"))
    }
    return {
        "name": f"{config.benchmark.name}_{device.type}_{stamp}",
        "occasion": describe_occasion(device),
        "build": torch.__config__.show(),
        "threads": {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
        "allocator": {"keeps_freed_memory": bool(kept), "environment": allocator},
        "settings": OmegaConf.to_container(config.benchmark, resolve=True),
        "precision": config.precision,
        "seed": config.seed,
        "figures": [],
        "rows": [],
    }


def _notes(record: Mapping[str, Any]) -> list[str]:
    hardware, software = record["occasion"]["hardware"], record["occasion"]["software"]
    kept = "freed memory kept" if record["allocator"]["keeps_freed_memory"] else "allocator as it comes"
    place = hardware.get("gpu") or f"{hardware['cpu']}, {record['threads']['torch']} threads"
    layer = record["settings"]["layer"]
    return [
        f"{place}; torch {software['torch']}; {kept}; commit {record['occasion']['commit'] or 'none'}",
        f"layer: B={layer['batch_size']}, H={layer['num_heads']}, D={layer['head_dim']}, float32; medians and quartiles of "
        "paired ratios, all works in turn in one process",
    ]


def _write(folder: Path, record: dict[str, Any], config: DictConfig) -> None:
    stem, notes = folder / record["name"], _notes(record)
    content = json.dumps(record, indent=1, ensure_ascii=False).encode()
    write_atomically(stem.with_suffix(".json"), content)
    write_atomically(stem.with_suffix(".csv"), pd.DataFrame(record["rows"]).to_csv(index=False).encode())
    scaling = [row for row in record["rows"] if row["part"] == "scaling"]
    tables = [figures_table(record["figures"], notes)] if record["figures"] else []
    if scaling:
        key = time_of(record["occasion"]["hardware"]["device"])
        step = f"batch {scaling[0]['batch_size']}; peak memory beyond what the step starts with; exponents are least-squares slopes"
        tables.append(scaling_table(scaling, [notes[0], step], key))
        shown = [name for name in config.benchmark.scaling.shown if any(row["subject"] == name for row in scaling)]
        save_figure(scaling_figure(scaling, shown, key), folder / f"{record['name']}_scaling")
    on_gpu = [row for row in record["rows"] if row["part"] == "gpu"]
    if on_gpu:
        settings = record["settings"]["gpu"]
        shape = f"B L = {settings['tokens']}, H={settings['num_heads']}, D={settings['head_dim']}; medians"
        tables.append(gpu_table(on_gpu, [notes[0], shape, "training: forward and backward to q, k and v"]))
    text = "\n".join(table.markdown() for table in tables)
    write_atomically(stem.with_suffix(".md"), text.encode())
    print(text)
    say(f"written to {folder}: {record['name']}.json, .csv, .md")


def _read(folder: Path, name: str) -> dict[str, Any]:
    """A record by its path, or by its name in the benchmark folder."""
    for path in (Path(name), folder / name, folder / f"{name}.json"):
        if path.is_file():
            try:
                record = json.loads(path.read_text())
                return {key: record[key] for key in ("name", "occasion", "settings", "figures")}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} is no benchmark record ({error!r}); name a .json that job=benchmark wrote"
                ) from None
    there = sorted(path.stem for path in folder.glob("*.json"))
    raise ValueError(f"compare={name}: no such record; {folder} holds {', '.join(there) or 'none yet'}")
