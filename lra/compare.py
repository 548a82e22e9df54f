"""Owns the comparison of two runs or more on the command line: accuracy, cost, configuration, the paired test."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from lra.display import say
from lra.html_report_data import flat
from lra.ledger import Ledger
from lra.records import RunRecord
from lra.statistics import Paired, paired
from lra.tables import MISSING, Table
from lra.tracking import hardware_name


def compare(config: DictConfig) -> None:
    """The job: `runs=a,b` names runs by id or by its beginning; the first one is what the others are compared with."""
    names = [str(name) for name in config.runs]
    if len(names) < 2:
        raise ValueError("job=compare needs two runs or more: runs=<id>,<id>; job=status and the report list the ids")
    ledger = Ledger(config.paths.runs)
    records, damaged = ledger.read_all()
    for line in damaged:
        say(f"left out, cannot be read: {line}")
    known = {record.run_id: record for record in records}
    chosen = [known[find(name, known, str(ledger.folder))] for name in names]
    if len({record.run_id for record in chosen}) < len(chosen):
        raise ValueError(f"runs={','.join(names)} names a run twice; a comparison needs different ones")
    print(overview(chosen).markdown())
    print(differences(chosen).markdown())
    for other in chosen[1:]:
        for line in verdict(other, chosen[0], records):
            print(line)


def find(name: str, known: Mapping[str, RunRecord], where: str) -> str:
    """The id that `name` is or begins. ValueError lists what is close."""
    matches = [run_id for run_id in sorted(known) if run_id.startswith(name)] if name else []
    if name in known or len(matches) == 1:
        return name if name in known else matches[0]
    if not known:
        raise ValueError(f"no run {name!r}: {where} holds no record yet")
    close = matches or difflib.get_close_matches(name, known, n=5, cutoff=0.3) or sorted(known)[:5]
    listed = "".join(f"\n  {run_id}  {_title(known[run_id])}" for run_id in close[:10])
    problem = f"{len(matches)} runs begin with {name!r}" if matches else f"no run {name!r} in {where}"
    raise ValueError(f"{problem}; {'choose one' if matches else 'close ones'}:{listed}")


def overview(records: Sequence[RunRecord]) -> Table:
    facts = [
        ("task and data", lambda r: r.dataset), ("attention", lambda r: r.label), ("protocol", lambda r: r.protocol),
        ("seed", lambda r: str(r.seed)),
        ("status", lambda r: r.status), ("test accuracy, %", _of(_accuracy)),
        ("validation accuracy, %", _of(lambda r: f"{100 * r.result['val_best_accuracy']:.2f}")),
        ("training examples/s", _of(lambda r: f"{r.efficiency['train_step']['examples_per_second']:,.1f}")),
        ("inference examples/s", _of(lambda r: f"{r.efficiency['inference']['examples_per_second']:,.1f}")),
        ("training step, MiB", _of(lambda r: f"{r.efficiency['train_step']['peak_memory_bytes'] / 2**20:,.1f}")),
        ("parameters", _of(lambda r: f"{r.efficiency['parameters']:,}")),
        ("fit, seconds", _of(lambda r: f"{r.provenance['seconds']['fit']:,.0f}")),
        ("hardware", hardware_name), ("commit", lambda r: str(r.provenance.get("commit"))),
    ]  # fmt: skip
    cells = {record.run_id: [show(record) for _, show in facts] for record in records}
    frame = pd.DataFrame(cells, index=pd.Index([name for name, _ in facts], name="run"))
    machines = {hardware_name(record) for record in records}
    notes = ("Measured on different hardware: throughput does not compare.",) if len(machines) > 1 else ()
    return Table("Runs", frame, notes)


def differences(records: Sequence[RunRecord]) -> Table:
    """The settings in which the runs are not alike."""
    settings: list[dict[str, Any]] = []
    for record in records:
        parts = {key: item for part, value in record.identity.items() for key, item in flat(value, part).items()}
        settings.append(parts | {f"data.sha256.{k}": v[:12] for k, v in record.data.get("sha256", {}).items()})
    keys = sorted({key for found in settings for key in found})
    unlike = [key for key in keys if len({repr(found.get(key)) for found in settings}) > 1]
    cells = {
        r.run_id: [str(found.get(key, MISSING)) for key in unlike] for r, found in zip(records, settings, strict=True)
    }
    frame = pd.DataFrame(cells, index=pd.Index(unlike, name="setting"))
    return Table("Configuration: what differs", frame, () if unlike else ("Nothing.",))


def verdict(a: RunRecord, b: RunRecord, records: Sequence[RunRecord]) -> list[str]:
    """The paired test of the two runs, and of all seeds that the ledger holds of the two configurations."""
    heading = f"### {a.run_id} ({a.label}) against {b.run_id} ({b.label})\n"
    if a.status != "finished" or b.status != "finished":
        return [heading, f"No test: {a.run_id} {a.status}, {b.run_id} {b.status}.\n"]
    if a.data["sha256"]["test"] != b.data["sha256"]["test"]:
        return [heading, "No paired test: the test examples differ (another SHA-256 of the test split).\n"]
    lines = [heading, "These two runs: " + describe(paired({0: a}, {0: b})) + _one_seed(a, b)]
    both = _seeds_of(a, records), _seeds_of(b, records)
    if len(set(both[0]) & set(both[1])) > 1:
        test = paired(*both)
        lines.append(f"Seeds {', '.join(map(str, test.seeds))}, which both have finished: {describe(test)}")
    return [*lines, ""]


def describe(test: Paired) -> str:
    return (
        f"{100 * test.difference:+.2f} points (95 % interval {100 * test.low:+.2f} to {100 * test.high:+.2f}), "
        f"{test.only_a} right in the first alone, {test.only_b} in the second alone, of "
        f"{test.examples * len(test.seeds)}; p = {test.p_value:.3g} ({test.method})."
    )


def _one_seed(a: RunRecord, b: RunRecord) -> str:
    if a.seed != b.seed:
        return (
            f" Seeds {a.seed} and {b.seed} differ: this compares two trained models, and says nothing of their kinds."
        )
    return " One seed: this compares two trained models, not what other seeds would give."


def _seeds_of(record: RunRecord, records: Sequence[RunRecord]) -> dict[int, RunRecord]:
    """The finished runs that differ from this one in the seed alone."""
    own = {key: value for key, value in record.identity.items() if key != "seed"}
    same = [
        r for r in records if r.status == "finished" and {k: v for k, v in r.identity.items() if k != "seed"} == own
    ]
    return {r.seed: r for r in same}


def _accuracy(record: RunRecord) -> str:
    best = record.result["test_best"]
    return f"{100 * best['accuracy']:.2f} ({best['correct']} of {best['total']})"


def _of(show: Any) -> Any:
    return lambda record: show(record) if record.status == "finished" else MISSING


def _title(record: RunRecord) -> str:
    return f"{record.task}, {record.label}, seed {record.seed}, {record.protocol}, {record.status}"
