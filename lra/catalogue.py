"""Owns the catalogue of mechanisms: a Markdown page made from conf/attention/ and from what the built mechanisms say."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from lra.display import say
from lra.ledger import write_atomically

# the rules of the slot (tests/attention/test_contract.py) that a definition may contradict
_RULES = {
    "U1": "padded positions have no influence",
    "U2": "more padding changes nothing",
    "U3": "constant values pass unchanged",
    "U5": "positions are a set: a permutation of the keys changes nothing",
    "U6": "every output sees every real token",
    "U7": "examples do not meet in a batch",
    "U8": "gradients are those of the forward pass",
    "memory": "memory grows at most linearly with the length",
}
_CONF = Path(__file__).resolve().parents[1] / "conf" / "attention"
_HEAD = """# The mechanisms

One line for every file of `conf/attention/`; `attention=<name>` puts it into the slot. Made by
`python run.py job=catalogue` from the configurations and from the built mechanisms: edit those, not this page.

- **exact**: computes its own definition, nothing is estimated; **approximate**: estimates or approximates another one.
- **time**: of one forward pass and head. L length, D head_dim, F num_features; b block size, c chunk or summary
  positions, k projected length, l stride or packed length, m landmarks, p degree, r sketch_dim, R hash rounds,
  u selected queries, U sampled keys, w window.
- **parameters**, **buffers**: numbers held by one layer's slot with {num_heads} heads, head_dim {head_dim}, max_len
  {max_len}. Buffers are random draws and the like: part of the `state_dict`, not trained.
- **exempt from**: rules of the slot that the definition contradicts; the reasons are below.

| attention | what it is | paper | | time | parameters | buffers | exempt from |
|---|---|---|---|---|---:|---:|---|
"""


class Entry(NamedTuple):
    """What the page says of one mechanism."""

    name: str
    title: str
    description: Any
    parameters: int
    buffers: int
    exemptions: dict[str, str]

    def line(self) -> str:
        paper = self.description.paper
        link = f"[{paper}](https://arxiv.org/abs/{paper})" if re.fullmatch(r"\d{4}\.\d{5}", paper) else "–"
        kind = "exact" if self.description.exact else "approximate"
        cells = (
            f"`{self.name}`", self.title, link, kind, self.description.complexity, f"{self.parameters:,}",
            f"{self.buffers:,}", ", ".join(sorted(self.exemptions)),
        )  # fmt: skip
        return "| " + " | ".join(cells) + " |"


def catalogue(config: DictConfig) -> None:
    """The job: write the page to `catalogue.path`."""
    text, path = page(config.catalogue.shape), Path(config.catalogue.path)
    write_atomically(path, text.encode())
    say(f"written: {path}")


def page(shape_node: DictConfig) -> str:
    """The whole Markdown page. Needs Hydra's configuration to be open."""
    shape = instantiate(shape_node)
    entries = list(entries_of(shape))
    head = _HEAD.format(num_heads=shape.num_heads, head_dim=shape.head_dim, max_len=shape.max_len)
    return head + "\n".join(entry.line() for entry in entries) + "\n" + _reasons(entries)


def entries_of(shape: Any) -> Iterator[Entry]:
    for name in sorted(GlobalHydra.instance().config_loader().get_group_options("attention")):
        factory = instantiate(compose(f"attention/{name}").attention)
        module = factory(shape, torch.Generator().manual_seed(0))
        yield Entry(
            name,
            title_of(name),
            module.description,
            sum(p.numel() for p in module.parameters()),
            sum(b.numel() for b in module.buffers()),
            dict(module.exemptions),
        )


def title_of(name: str) -> str:
    """The first comment of the file, without the paper at its end."""
    first = (_CONF / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ")
    return re.sub(r", (\d{4}\.\d{5}|-)$", "", first).replace("|", r"\|")


def _reasons(entries: list[Entry]) -> str:
    lines = ["", "## Exemptions", ""]
    for rule in sorted({rule for entry in entries for rule in entry.exemptions}):
        lines.append(f"**{rule}**, {_RULES[rule]}:")
        reasons: dict[str, list[str]] = {}
        for entry in entries:
            if rule in entry.exemptions:
                reasons.setdefault(entry.exemptions[rule], []).append(f"`{entry.name}`")
        lines += ["", *(f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()), ""]
    return "\n".join(lines)
