"""Owns the ranking of a task's attentions on the command line, with intervals and the paired test against the first."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from lra.display import say
from lra.html_report_entries import Entry, gather, setting_of
from lra.records import RunRecord
from lra.statistics import holm, paired, summarise
from lra.tables import MISSING, Table


def leaderboard(config: DictConfig) -> None:
    """The job: `task=listops` ranks it, one table per data source, protocol and settings."""
    gathered = gather([Path(config.paths.runs)])
    for line in gathered.damaged:
        say(f"left out, cannot be read: {line}")
    tables = rankings([entry for entry in gathered.entries if entry.record.task == config.names.task])
    if not tables:
        held = sorted({entry.record.task for entry in gathered.entries if entry.record.status == "finished"})
        there = f"finished runs of {', '.join(held)}" if held else "no finished run at all"
        raise ValueError(
            f"no finished run of task={config.names.task} in {config.paths.runs}, which holds {there}; "
            f"run python run.py task={config.names.task} attention=softmax first"
        )
    for table in tables:
        print(table.markdown())


def rankings(entries: Sequence[Entry]) -> list[Table]:
    groups: dict[tuple[str, str], dict[str, dict[int, RunRecord]]] = defaultdict(lambda: defaultdict(dict))
    lost: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        record, place = entry.record, (entry.column, setting_of(entry.row))
        if record.status == "finished":
            groups[place][entry.row[0]].setdefault(record.seed, record)
        elif record.data:
            lost[place][entry.row[0]].append(f"seed {record.seed} {record.status}")
    return [
        _ranking(column, setting, groups[column, setting], lost[column, setting]) for column, setting in sorted(groups)
    ]


def _ranking(
    column: str, setting: str, runs: Mapping[str, Mapping[int, RunRecord]], lost: Mapping[str, Sequence[str]]
) -> Table:
    summaries = {
        name: summarise([100 * r.result["test_best"]["accuracy"] for r in runs[name].values()]) for name in runs
    }
    order = sorted(runs, key=lambda name: (-summaries[name].mean, name))
    tests = {}
    for name in order[1:]:
        try:
            tests[name] = paired(runs[name], runs[order[0]])
        except ValueError:
            continue  # nothing to pair: the cells show a dash
    corrected = dict(zip(tests, holm([test.p_value for test in tests.values()]), strict=True))
    rows = []
    for name in order:
        one, test = summaries[name], tests.get(name)
        speeds = sorted(r.efficiency["train_step"]["examples_per_second"] for r in runs[name].values())
        rows.append(
            {
                "attention": name,
                "accuracy, %": f"{one.mean:.2f}" + ("" if one.std is None else f" ± {one.std:.2f}"),
                "n": str(one.n),
                "95 % interval": MISSING if one.low is None else f"{one.low:.2f} to {one.high:.2f}",
                "behind the first": MISSING if test is None else f"{100 * test.difference:+.2f}",
                "p (Holm)": MISSING if test is None else f"{corrected[name]:.3g}",
                "training examples/s": f"{speeds[len(speeds) // 2]:,.0f}",
            }
        )
    frame = pd.DataFrame(rows, index=pd.Index(range(1, len(rows) + 1), name="rank"))
    majority = sorted({r.result["majority_accuracy"] for held in runs.values() for r in held.values()})
    notes = [
        "Accuracy: mean ± standard deviation over n seeds; the interval is the t-interval of the mean; one seed has none.",
        f"Majority class: {' to '.join(f'{100 * value:.2f}' for value in majority)} %.",
        "p: paired with the first rank on the same seeds and test examples, corrected by Holm over the table; a dash: "
        "nothing to pair. The first rank was chosen for being first, which makes p a little optimistic.",
    ]
    notes += [f"{name}: {', '.join(sorted(what))}." for name, what in sorted(lost.items())]
    return Table(f"{column}, protocol {setting}", frame, tuple(notes))
