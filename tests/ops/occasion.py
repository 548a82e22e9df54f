"""Owns the first line of a study's output: what was run, of which commit, on what."""

import torch

from lra.provenance import describe_occasion


def occasion() -> str:
    found = describe_occasion(torch.device("cpu"))
    hardware, software = found["hardware"], found["software"]
    place = f"{hardware['cpu']}, {hardware['cores']} cores"
    return (
        f"{found['command']} · commit {found['commit']} · {place} · Python {software['python']} · {found['started_at']}"
    )
