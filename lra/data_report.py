"""Owns the data report: a card per source that is ready, as Markdown files and as one HTML page with pictures."""

from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data.base import DataError, Manifest, Task
from lra.baselines import read_floors
from lra.data_cards import card_of, table_of
from lra.data_figures import draw_contact_sheet, draw_statistics
from lra.data_jobs import READY, Asked, look, tasks_asked_for
from lra.display import say
from lra.experiment import build_model, choose_device
from lra.ledger import write_atomically
from lra.loading import loading_cost
from lra.provenance import hardware

TEMPLATES = Path(__file__).parent / "templates"


def data_report(config: DictConfig) -> None:
    """The job. Prepares nothing: what is not ready is listed with the way to get it."""
    torch.set_num_threads(config.threads)
    folder = Path(config.paths.runs) / "data_report"
    floors = read_floors(Path(config.paths.runs) / "baselines")
    cards, absent = [], []
    for asked in tasks_asked_for():
        found = look(asked)
        if found.state == READY:
            say(f"{found.dataset} ({asked.source})")
            cards.append(_card(asked, config, folder, floors))
        else:
            where = found.where.relative_to(config.paths.datasets) if _inside(found.where, config) else found.where
            absent.append({"task": found.task, "source": found.source, "state": found.state, "where": str(where)})
    if not cards:
        raise DataError("no data set is ready: see `make data`, and prepare one")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for card in cards:
        text = environment.get_template("data_card.md").render(card=card)
        write_atomically(folder / f"{card['name']}.md", text.encode())
    environment.autoescape = True
    machine = hardware(choose_device(config.device))
    page = environment.get_template("data_report.html").render(cards=cards, absent=absent, hardware=machine)
    write_atomically(folder / "index.html", page.encode())
    write_atomically(folder / "data.csv", table_of(cards).to_csv(index=False).encode())
    say(f"written to {folder}: index.html, data.csv, and {len(cards)} cards")


def _inside(path: Path, config: DictConfig) -> bool:
    return path.is_relative_to(config.paths.datasets)


def _card(asked: Asked, config: DictConfig, folder: Path, floors: pd.DataFrame) -> dict[str, Any]:
    task, job = asked.task, config.job
    manifest = task.prepare()
    shown = manifest.dataset.startswith(tuple(job.may_be_shown))
    card = card_of(task, asked.config, manifest, shown, _floors_of(floors, manifest, task))
    draw_statistics(task, folder / f"{card['name']}.png")
    card["sheet"] = None
    if shown and task.image_side is not None:
        rows, columns = (4, 10) if task.image_side <= 64 else (3, 7)
        card["sheet"] = draw_contact_sheet(task, folder / f"{card['name']}-images.png", rows, columns).name
    card["loading"] = _loading(asked, config)
    return card


def _floors_of(floors: pd.DataFrame, manifest: Manifest, task: Task) -> pd.DataFrame:
    return floors[(floors["test_sha256"] == manifest.sha256["test"]) & (floors["max_len"] == task.max_len)]


def _loading(asked: Asked, config: DictConfig) -> dict[str, Any] | None:
    """None where it was not asked for, or where the protocol has no numbers for this task."""
    job, name = config.job, asked.name
    if job.loading_batch_size is None or OmegaConf.select(asked.config, f"per_task.{name}.learning_rate") is None:
        return None
    device = choose_device(config.device)
    return loading_cost(
        build_model(asked.config, asked.task).to(device),
        asked.task,
        instantiate(asked.config.protocol),
        seed=config.seed,
        device=device,
        precision=config.precision,
        batch_size=job.loading_batch_size,
        repetitions=job.loading_repetitions,
    )
