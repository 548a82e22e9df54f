"""Owns studies.md: every claim of every study with its verdict and its figure, one page per claim, from records alone."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lra.display import say
from lra.ledger import write_atomically


def report(config: DictConfig) -> None:
    """The job: read <paths.runs>/studies/*/study.json and write studies.md beside them. Figures are linked, not copied."""
    folder = Path(config.paths.runs).expanduser() / "studies"
    studies = read_studies(folder)
    if not studies:
        say(
            f"no study has been run yet in {folder}: run one first, e.g. python run.py experiment=schoenbat_approximation"
        )
        return
    text = render(studies)
    write_atomically(folder / "studies.md", text.encode())
    print(summary(studies))
    claims = sum(len(study["verdicts"]) for study in studies)
    say(f"written to {folder / 'studies.md'}: {claims} claims of {len(studies)} studies")


def read_studies(folder: Path) -> list[dict[str, Any]]:
    """The records in order of their names. A damaged one is an error: a report must not leave out claims in silence."""
    studies = []
    for path in sorted(folder.glob("*/study.json")):
        try:
            study = json.loads(path.read_text())
            missing = {"study", "config", "seed", "provenance", "verdicts", "files"} - set(study)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}). Run python run.py experiment={path.parent.name} again"
            ) from error
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}. Run experiment={path.parent.name} again")
        studies.append(study)
    return studies


def render(studies: list[dict[str, Any]]) -> str:
    parts = ["# The papers' claims, tested\n", summary(studies)]
    for study in studies:
        parts.append(f"\n## {study['study']}\n\n{_origin(study)}")
        parts += [_page(study, place, verdict) for place, verdict in enumerate(study["verdicts"], start=1)]
        parts.append(_files(study))
    return "\n".join(parts)


def summary(studies: list[dict[str, Any]]) -> str:
    """All verdicts in one table."""
    rows = ["| study | claim | verdict | number | interval |", "|---|---|---|---:|---|"]
    for study in studies:
        for place, verdict in enumerate(study["verdicts"], start=1):
            link = f"[{_cell(verdict['claim'])}](#{_anchor(study, place)})"
            rows.append(
                f"| {study['study']} | {link} | {verdict['status']} | {number(verdict['number'])} | "
                f"{interval(verdict['interval'])} |"
            )
    return "\n".join(rows) + "\n"


def _origin(study: dict[str, Any]) -> str:
    made = study["provenance"]
    hardware = made["hardware"]
    where = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    commit = str(made["commit"])[:12] if made["commit"] else "no commit"
    scale = study["config"].get("scale", "-")
    return f"Scale {scale}, seed {study['seed']}, {made['started_at']}, commit {commit}, {where}. `{made['command']}`\n"


def _page(study: dict[str, Any], place: int, verdict: dict[str, Any]) -> str:
    """One claim: verdict, number, interval, conditions, and the figure that shows it (all, where it names none)."""
    shown = [name for name in study["files"] if name.endswith(".png")]
    if verdict.get("figure"):
        shown = [name for name in shown if name == f"{verdict['figure']}.png"]
    pictures = "\n".join(f"![{Path(name).stem} of {study['study']}]({study['study']}/{name})\n" for name in shown)
    bounds = "" if verdict["interval"] is None else f" {interval(verdict['interval'])}"
    return (
        f'\n<div style="page-break-before: always"></div>\n<a id="{_anchor(study, place)}"></a>\n\n'
        f"### {verdict['claim']}\n\n**{verdict['status'].capitalize()}**: {number(verdict['number'])}{bounds}\n\n"
        f"{verdict['conditions']}\n\n{pictures}"
    )


def _files(study: dict[str, Any]) -> str:
    data = [name for name in dict.fromkeys(study["files"]) if name.endswith(".csv")]
    links = ", ".join(f"[{name}]({study['study']}/{name})" for name in data)
    return f"\nData of {study['study']}: {links}; configuration and seed: [study.json]({study['study']}/study.json)\n"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def interval(bounds: list[float | None] | None) -> str:
    return "–" if bounds is None else f"[{number(bounds[0])}, {number(bounds[1])}]"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _anchor(study: dict[str, Any], place: int) -> str:
    return f"{study['study']}-{place}"
