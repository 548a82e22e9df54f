"""Owns the study of the speed-accuracy frontier: output error against measured time for every approximation.

Error is over the signal, exact output minus mean pooling, so 1 is what mean pooling scores. Two references: softmax, and
the exact form that a mechanism has of its own. L positions, one head.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from lra.studies.frontier_figures import frontier_figure, own_figure
from lra.studies.mechanisms import Catalogue, Inputs, interleaved_seconds, signal_error
from lra.studies.runner import Outputs, Verdict
from lra.tables import MISSING, Table

UNLISTED = "added since"


def run(config: DictConfig, outputs: Outputs) -> None:
    study = config.study
    families = families_of(study)
    names = [name for members in families.values() for name in members]
    catalogue: Catalogue = instantiate(study.catalogue)
    times = pd.concat([measure_times(study, catalogue, names, length, outputs) for length in study.lengths])
    errors = pd.concat([measure_errors(study, catalogue, names, length, outputs) for length in study.lengths])
    points = place_on_front(study, errors, times, outputs.seed)
    family_of = {name: family for family, members in families.items() for name in members}
    points.insert(1, "family", points["attention"].map(family_of))
    outputs.frame("times", times)
    outputs.frame("errors", errors)
    outputs.frame("points", points)
    outputs.table("front", front_table(points, study))
    outputs.figure("frontier", frontier_figure(points, times, study, list(families)))
    outputs.figure("own_reference", own_figure(points, study, list(families)))
    for verdict in verdicts(points, times, study):
        outputs.verdict(verdict)


def families_of(study: DictConfig) -> dict[str, list[str]]:
    """The approximations by family. A file of conf/attention that the study does not name joins under UNLISTED."""
    families = {str(family): list(members) for family, members in study.families.items()}
    listed = {name for members in families.values() for name in members} | set(study.left_out)
    catalogue = GlobalHydra.instance().config_loader().get_group_options("attention")
    unknown = sorted(listed - set(catalogue))
    if unknown:
        raise ValueError(
            f"study.families or study.left_out names {', '.join(unknown)}, which conf/attention/ does not hold; "
            "take the name out, or add the file"
        )
    added = [name for name in catalogue if name not in listed]
    return {**families, UNLISTED: added} if added else families


def make_inputs(study: DictConfig, kind: str, length: int, seed: int) -> Inputs:
    """q and k of entry size `sharpness`, sharing a component of energy share `locality` that varies slowly over L."""
    setting = study.inputs[kind]
    generator = torch.Generator().manual_seed(seed)
    q, k, v, noise = torch.randn(4, 1, study.num_heads, length, study.head_dim, generator=generator)
    width = int(study.correlation_length)
    window = torch.hann_window(2 * width + 1)
    padded = torch.cat([noise[..., -width:, :], noise, noise[..., :width, :]], dim=-2)  # periodic in the position
    slow = (padded.unfold(-2, 2 * width + 1, 1) * window).sum(dim=-1) / window.norm()
    weight = setting.locality**0.5
    rest = (1 - setting.locality) ** 0.5
    q, k = (setting.sharpness * (rest * x + weight * slow) for x in (q, k))
    return Inputs(q, k, v)


def _settings(study: DictConfig, length: int, seed: int) -> dict[str, int]:
    return {"num_heads": study.num_heads, "head_dim": study.head_dim, "max_len": length, "seed": seed}


@torch.no_grad()
def measure_times(
    study: DictConfig, catalogue: Catalogue, names: Sequence[str], length: int, outputs: Outputs
) -> pd.DataFrame:
    """Seconds of one forward, all mechanisms and softmax in turns: one row per mechanism and round."""
    data = make_inputs(study, next(iter(study.inputs)), length, outputs.seed).to(outputs.device)
    settings = _settings(study, length, outputs.seed)
    built = {name: catalogue.build(name, **settings).to(outputs.device) for name in (study.target, *names)}
    work = {name: lambda module=module: module(data.q, data.k, data.v) for name, module in built.items()}
    seconds = interleaved_seconds(work, study.rounds, outputs.device)
    return pd.DataFrame(
        [
            {"attention": name, "length": length, "round": turn, "seconds": value}
            for name, values in seconds.items()
            for turn, value in enumerate(values)
        ]
    )


@torch.no_grad()
def measure_errors(
    study: DictConfig, catalogue: Catalogue, names: Sequence[str], length: int, outputs: Outputs
) -> pd.DataFrame:
    """One row per kind of inputs, draw, mechanism: error against softmax, and against its own exact form if it has one."""
    rows = []
    for kind in study.inputs:
        for draw in range(study.draws):
            data = make_inputs(study, kind, length, outputs.seed + draw).to(outputs.device)
            settings = _settings(study, length, outputs.seed + draw)

            def output_of(name: str, data: Inputs = data, settings: dict[str, int] = settings) -> Tensor:
                return catalogue.build(name, **settings).to(outputs.device)(data.q, data.k, data.v)

            exact = output_of(study.target)
            references = {name: output_of(name) for name in dict.fromkeys(study.own.values())}
            for name in names:
                out = output_of(name)
                own = study.own.get(name)
                rows.append({
                    "attention": name, "length": length, "inputs": kind, "draw": draw,
                    "error": signal_error(out, exact, data.v),
                    "own_reference": own, "own_error": own_error(out, references[own], data.v) if own else None,
                })  # fmt: skip
    return pd.DataFrame(rows)


def own_error(out: Tensor, exact: Tensor, v: Tensor) -> float:
    """As signal_error, but over what the best multiple of mean pooling leaves: not every exact form is normalised."""
    mean = v.mean(dim=-2, keepdim=True).expand_as(exact)
    signal = exact - (exact * mean).sum() / mean.square().sum() * mean
    return float((out - exact).norm() / signal.norm())


def on_front(seconds: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """True where no other point is at least as fast and at least as accurate, and better in one of the two."""
    no_worse = (seconds[None] <= seconds[:, None]) & (errors[None] <= errors[:, None])
    better = (seconds[None] < seconds[:, None]) | (errors[None] < errors[:, None])
    return ~(no_worse & better).any(axis=1)


def place_on_front(study: DictConfig, errors: pd.DataFrame, times: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row per length, inputs, mechanism: time of the fastest round (what disturbs a round only makes it slower),
    median error, and the share of resamples of rounds and draws in which it
    is on the front. `behind` is its error over the best error that no more time buys."""
    generator = np.random.default_rng(seed)
    rows = []
    for (length, kind), group in errors.groupby(["length", "inputs"], sort=False):
        error = group.pivot(index="draw", columns="attention", values="error")
        names = [name for name in dict.fromkeys(group["attention"])]
        error_of = error[names].to_numpy()  # [draws, mechanisms]
        timed = times[times["length"] == length].pivot(index="round", columns="attention", values="seconds")
        seconds_of = timed[names].to_numpy()  # [rounds, mechanisms]
        seconds, middle = seconds_of.min(axis=0), np.median(error_of, axis=0)
        placed, front = on_front(seconds, middle), np.zeros(len(names))
        behind = []
        for _ in range(study.resamples):
            t = seconds_of[generator.integers(0, len(seconds_of), len(seconds_of))].min(axis=0)
            e = np.median(error_of[generator.integers(0, len(error_of), len(error_of))], axis=0)
            front += on_front(t, e)
            behind.append(_behind(t, e))
        low, high = np.quantile(behind, [0.025, 0.975], axis=0)
        own = group.groupby("attention", sort=False)["own_error"].median()
        for i, name in enumerate(names):
            rows.append({
                "attention": name, "length": length, "inputs": kind, "seconds": seconds[i],
                "seconds_median": np.median(seconds_of[:, i]),
                "error": middle[i], "error_low": error_of[:, i].min(), "error_high": error_of[:, i].max(),
                "own_error": own[name], "on_front": placed[i], "front": front[i] / study.resamples,
                "behind": _behind(seconds, middle)[i], "behind_low": low[i], "behind_high": high[i],
            })  # fmt: skip
    return pd.DataFrame(rows)


def _behind(seconds: np.ndarray, errors: np.ndarray) -> np.ndarray:
    affordable = np.where(seconds[None] <= seconds[:, None], errors[None], np.inf)
    return errors / affordable.min(axis=1)


def front_table(points: pd.DataFrame, study: DictConfig) -> Table:
    """Who is on the front: `error at milliseconds`, one column per panel."""
    chosen = points[points["on_front"]]
    columns = [(length, kind) for kind in study.inputs for length in study.lengths]
    labels = [f"{kind}, L = {length}" for length, kind in columns]
    names = [
        name for name in dict.fromkeys(points.sort_values("seconds")["attention"]) if name in set(chosen["attention"])
    ]
    cells = pd.DataFrame(MISSING, index=pd.Index(names, name="attention"), columns=labels)
    for (length, kind), label in zip(columns, labels, strict=True):
        for row in chosen[(chosen["length"] == length) & (chosen["inputs"] == kind)].itertuples():
            cells.loc[row.attention, label] = f"{row.error:.3g} at {1e3 * row.seconds:.3g} ms"
    return Table(
        "On the Pareto front of output error against softmax and time of one forward",
        cells,
        (
            "Error over the signal; 1 is mean pooling.",
            f"{study.num_heads} head of {study.head_dim} channels, fastest of {study.rounds} interleaved rounds, "
            f"{study.draws} draws of inputs and features.",
        ),
    )


def verdicts(points: pd.DataFrame, times: pd.DataFrame, study: DictConfig) -> list[Verdict]:
    found = [_front_verdict(points, name, study) for name in study.claimed]
    found += [_own_verdict(points, name, study) for name in study.claimed]
    return [*found, _speed_verdict(points, times, study), _use_verdict(points)]


def _front_verdict(points: pd.DataFrame, name: str, study: DictConfig) -> Verdict:
    rows = points[points["attention"] == name]
    on = rows[rows["on_front"]]
    worst = rows.loc[rows["behind"].idxmax()]
    where = "; ".join(f"{row.inputs}, L = {row.length}" for row in on.itertuples()) or "no panel"
    status = "reproduced" if len(on) == len(rows) else "reproduced under conditions" if len(on) else "not reproduced"
    return Verdict(
        f"{name} is on the front of error against softmax; its error over the best that its time buys, worst panel",
        status,
        float(worst["behind"]),
        (float(worst["behind_low"]), float(worst["behind_high"])),
        f"on the front in {len(on)} of {len(rows)} panels ({where}); number at {worst['inputs']}, L = {worst['length']}; share "
        f"of resamples on the front {rows['front'].min():.2g} to {rows['front'].max():.2g}",
        figure="frontier",
    )


def _own_verdict(points: pd.DataFrame, name: str, study: DictConfig) -> Verdict:
    errors = points[points["attention"] == name]["own_error"]
    return Verdict(
        f"{name} follows {study.own[name]}, the attention that it estimates; error over its signal, worst panel",
        "reproduced" if errors.max() < 0.5 else "not reproduced",
        float(errors.max()),
        (float(errors.min()), float(errors.max())),
        "reproduced would be below 0.5, half of the signal; the range is over panels",
        figure="own_reference",
    )


def _speed_verdict(points: pd.DataFrame, times: pd.DataFrame, study: DictConfig) -> Verdict:
    longest = max(study.lengths)
    timed = times[times["length"] == longest].pivot(index="round", columns="attention", values="seconds")
    fastest = timed.min()
    middle = fastest[study.target] / fastest.drop(study.target)
    faster = middle[middle > 1]
    return Verdict(
        f"Approximations are faster than exact softmax at L = {longest}; median speed-up",
        "reproduced" if len(faster) == len(middle) else "reproduced under conditions",
        float(middle.median()),
        (float(middle.quantile(0.025)), float(middle.quantile(0.975))),
        f"{len(faster)} of {len(middle)} are; the range holds 95 % of the mechanisms; fastest {middle.idxmax()} "
        f"{middle.max():.3g} times, slowest {middle.idxmin()} {middle.min():.2g} times",
        figure="frontier",
    )


def _use_verdict(points: pd.DataFrame) -> Verdict:
    """How many approximations are closer to softmax than mean pooling is, per kind of inputs."""
    counts: dict[Any, str] = {}
    shares = []
    for (length, kind), group in points.groupby(["length", "inputs"], sort=False):
        useful = int((group["error_high"] < 1).sum())
        shares.append(useful / len(group))
        counts[kind, length] = f"{kind}, L = {length}: {useful} of {len(group)}"
    return Verdict(
        "Approximations follow softmax more closely than mean pooling does; smallest share that do",
        "reproduced" if min(shares) == 1 else "reproduced under conditions",
        min(shares),
        (min(shares), max(shares)),
        "; ".join(counts.values()) + "; untrained, the range is over panels",
        figure="frontier",
    )
