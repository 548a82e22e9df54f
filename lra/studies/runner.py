"""Owns what all studies share: where their outputs go, provenance, verdicts, printed tables, the mirror in wandb.

A study is a function and a YAML file, conf/experiment/<name>.yaml:

    # @package _global_
    experiment: <name>
    study:
      job: lra.studies.runner.run_study         # what run.py calls, in place of the default job `train`
      _target_: lra.studies.<name>.run
      scale: quick                              # `study.scale=paper` on the command line
      scales: {quick: {draws: 50}, paper: {draws: 400}}
      draws: ${study.scales.${study.scale}.draws}

`python run.py experiment=<name>` calls `run(config, outputs)`. The function computes, and hands what it found to

    outputs.frame("error", frame)               # tidy, one number per row      -> error.csv, wandb table `error`
    outputs.table("error_at_128", table)        # an lra.tables.Table, printed  -> .md .tex .csv
    outputs.figure("error", figure)             # matplotlib                    -> .png .pdf, wandb image
    outputs.verdict(Verdict(...))               # printed last                  -> wandb table `verdicts`

All lies in <paths.runs>/studies/<name>/, each file written by atomic rename; `study.json` holds configuration, seed,
provenance (commit, command, hardware), verdicts and the names of the files. It is written last, so that a folder whose
study.json names a file holds that file from one and the same run.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from hydra.utils import get_method, instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from lra.display import say
from lra.experiment import choose_device
from lra.figures import save_figure
from lra.ledger import write_atomically
from lra.provenance import describe_occasion
from lra.tables import Table

Status = Literal["reproduced", "reproduced under conditions", "not reproduced"]


@dataclass(frozen=True)
class Verdict:
    """What became of one claim of a paper. `interval` bounds `number` (95 % unless `conditions` says otherwise).
    `figure`: the name handed to `outputs.figure` of the picture that shows it; None: the report shows all of them."""

    claim: str
    status: Status
    number: float
    interval: tuple[float, float] | None
    conditions: str
    figure: str | None = None

    def __post_init__(self) -> None:
        assert self.status in get_args(Status), self.status

    def line(self) -> str:
        bounds = "" if self.interval is None else f" [{self.interval[0]:.3g}, {self.interval[1]:.3g}]"
        return f"{self.status.upper()}: {self.claim}: {self.number:.3g}{bounds} ({self.conditions})"


class Outputs:
    """What one study leaves behind. `device` is chosen by `device=`, `seed` by `seed=`."""

    def __init__(self, config: DictConfig) -> None:
        self.name = str(config.experiment)
        self.device: torch.device = choose_device(config.device)
        self.seed = int(config.seed)
        self.folder = Path(config.paths.runs).expanduser() / "studies" / self.name
        self._config = config
        self._provenance = describe_occasion(self.device)
        self._frames: dict[str, pd.DataFrame] = {}
        self._figures: list[Path] = []
        self._files: list[str] = []
        self._verdicts: list[Verdict] = []

    def frame(self, name: str, frame: pd.DataFrame) -> None:
        """Store a tidy frame, and let wandb have it as the table `name`."""
        self._frames[name] = frame
        self._write(f"{name}.csv", frame.to_csv(index=False))

    def table(self, name: str, table: Table) -> None:
        """Print a table and store it. Its name must not be that of a frame: both have a CSV file."""
        assert name not in self._frames, name
        print(table.markdown())
        for ending, text in ((".md", table.markdown()), (".tex", table.latex()), (".csv", table.csv())):
            self._write(name + ending, text)

    def figure(self, name: str, figure: Figure) -> None:
        paths = save_figure(figure, self.folder / name)
        self._figures += [path for path in paths if path.suffix == ".png"]
        self._files += [path.name for path in paths]

    def verdict(self, verdict: Verdict) -> None:
        self._verdicts.append(verdict)

    def notes(self) -> tuple[str, ...]:
        """For tables: seed, hardware and commit of these numbers."""
        found, commit = self._provenance["hardware"], str(self._provenance["commit"])
        machine = found.get("gpu") or f"{found['cpu']}, {found['threads']} threads"
        short = commit[:12] + ("+changes" if "+" in commit else "")
        return (f"Seed: {self.seed}.", f"Hardware: {machine}.", f"Commit: {short}.")

    def close(self) -> None:
        """Print the verdicts, write study.json, mirror everything to wandb."""
        for verdict in self._verdicts:
            print(verdict.line())
        content = {
            "study": self.name,
            "config": OmegaConf.to_container(self._config.study, resolve=True),
            "seed": self.seed,
            "provenance": self._provenance,
            "verdicts": [asdict(verdict) for verdict in self._verdicts],
            "files": self._files,
        }
        self._write("study.json", json.dumps(finite(content), indent=1, sort_keys=True, allow_nan=False) + "\n")
        self._track(content)
        say(f"written to {self.folder}: " + ", ".join(dict.fromkeys(self._files)))

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.folder / name, text.encode())
        self._files.append(name)

    def _track(self, content: dict[str, Any]) -> None:
        if self._config.tracking["mode"] == "disabled":
            return
        from lra.tracking import log_study

        frames = {**self._frames}
        if self._verdicts:
            frames["verdicts"] = pd.DataFrame([{**asdict(v), "interval": str(v.interval)} for v in self._verdicts])
        log_study(
            instantiate(self._config.tracking), self.name, content, frames, self._figures, Path(self._config.paths.runs)
        )


def run_study(config: DictConfig) -> None:
    """The job of a study: call the function that `study._target_` names, then store and track what it handed out."""
    scales = sorted(config.study.get("scales", {}))
    if scales and config.study.scale not in scales:
        raise ValueError(f"unknown study.scale={config.study.scale!r}; choose one of {', '.join(scales)}")
    torch.set_num_threads(config.threads)
    outputs = Outputs(config)
    get_method(config.study._target_)(config, outputs)
    outputs.close()


def median_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and two order statistics that enclose the true one with at least 95 % whatever the distribution; with
    fewer than 6 values no such pair exists, and these are the least and the greatest."""
    ordered = sorted(values)
    number, reach, below = len(ordered), 0, 0.5 ** len(ordered)
    while below + math.comb(number, reach + 1) * 0.5**number <= 0.025:
        reach += 1
        below += math.comb(number, reach) * 0.5**number
    return statistics.median(ordered), ordered[reach], ordered[number - 1 - reach]


def finite(node: Any) -> Any:
    """The same with None for every number that is not finite: JSON knows no NaN."""
    if isinstance(node, dict):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
