"""Owns the job that writes results/report.html: one self-contained file, a pure function of the records."""

import base64
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import DictConfig
from PIL import Image
from plotly.offline import get_plotlyjs

from lra.display import say
from lra.html_report_data import Report
from lra.html_report_entries import Gathered, gather, shown
from lra.ledger import write_atomically
from lra.published import load_paper, paper_keys

TEMPLATES = Path(__file__).parent / "templates"
FIGURE_BYTES = 2_000_000  # of all embedded figures together; what lies beyond is named and not embedded


def html_report(config: DictConfig) -> Path | None:
    """The job: every record under `job.folders` and `job.measured`."""
    folders = [Path(folder).expanduser() for folder in config.job.folders]
    gathered = gather(list(dict.fromkeys([*folders, *measured_folders(config.job.measured)])))
    for line in gathered.damaged:
        say(f"left out, cannot be read: {line}")
    if not gathered.entries:
        say(f"no record in {', '.join(gathered.folders)}: run something first, e.g. make reproduce")
        return None
    output = Path(config.job.output)
    page = render(gathered)
    write_atomically(output, page.encode())
    say(f"written: {output} ({len(gathered.entries)} runs, {len(page) / 1e6:.1f} MB); open it in a browser")
    return output


def measured_folders(measured: str | None) -> list[Path]:
    """The committed results: every folder in there that is laid out as a runs folder. A study's own ledger is none of
    them: its runs are that study's ablations, and would stand as further rows beside the attentions."""
    if measured is None:
        return []
    found = {path.parent for name in ("ledger", "studies", "benchmark") for path in Path(measured).rglob(name)}
    return sorted(folder for folder in found if "studies" not in folder.relative_to(measured).parts)


def render(gathered: Gathered) -> str:
    content = Report(gathered, [load_paper(key) for key in paper_keys()]).content()
    content["figures"], left_out = _figures([Path(folder) for folder in gathered.folders])
    content["figuresLeftOut"] = left_out
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    finished = sum(entry.record.status == "finished" for entry in gathered.entries)
    return environment.get_template("report.html").render(
        finished=finished,
        unfinished=len(gathered.entries) - finished,
        damaged=gathered.damaged,
        style=(TEMPLATES / "report.css").read_text(),
        scripts=[(TEMPLATES / name).read_text() for name in ("report_tables.js", "report_charts.js", "report.js")],
        content=_packed(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)),
        plotly=_packed(get_plotlyjs()),
    )


def _packed(text: str) -> str:
    """gzip in base64: a third of the size, and no character of the data can become mark-up. The page unpacks it."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _figures(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The studies' figures as data addresses, in order of their names, until FIGURE_BYTES are used up. One that came out
    the same again (in another folder) is shown once."""
    embedded, left_out, used = [], [], 0
    seen: set[bytes] = set()
    for path in (path for folder in folders for path in sorted(folder.glob("studies/*/*.png"))):
        try:
            content = _with_few_colours(path)
        except OSError as error:
            left_out.append(f"{shown(str(path))} (cannot be read: {error})")
            continue
        if content in seen:
            continue
        seen.add(content)
        if used + len(content) > FIGURE_BYTES:
            left_out.append(f"{shown(str(path))} ({len(content) / 1e6:.1f} MB)")
            continue
        used += len(content)
        image = base64.b64encode(content).decode()
        study, name = path.parent.name, path.stem.replace("_", " ")
        embedded.append(
            {"study": study, "name": name, "path": shown(str(path)), "image": f"data:image/png;base64,{image}"}
        )
    return embedded, left_out


def _with_few_colours(path: Path) -> bytes:
    """The same picture in 128 colours: a quarter of the bytes, and a diagram looks the same."""
    content = io.BytesIO()
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(content, "PNG", optimize=True)
    return content.getvalue()
