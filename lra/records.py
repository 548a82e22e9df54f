"""Owns RunRecord: all that a table or a sceptic needs to know of one run, and its JSON form."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

SCHEMA_VERSION = 1
Status = Literal["finished", "failed", "diverged", "oom"]


@dataclass(frozen=True)
class RunRecord:
    """`result` depends on the identity alone (on one CPU model it is bit-identical when run again);
    `efficiency` and `provenance` are measured or describe the occasion."""

    run_id: str
    status: Status
    experiment: str | None
    task: str  # the names of the YAML files
    attention: str
    protocol: str
    seed: int
    overrides: list[str]  # what was typed beyond task, attention, protocol, seed
    identity: dict[str, Any]
    data: dict[str, Any]  # the task's manifest
    result: dict[str, Any] = field(default_factory=dict)
    efficiency: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Raises ValueError saying what is wrong with the text."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema version {version!r}; this suite reads version {SCHEMA_VERSION}")
        expected, found = {f.name for f in fields(cls)}, set(content)
        if expected != found:
            missing, extra = sorted(expected - found), sorted(found - expected)
            raise ValueError(f"missing fields {missing}, unknown fields {extra}")
        return cls(**content)

    @property
    def label(self) -> str:
        """The attention's name, with what was overridden in it, so that two variants never share a table row."""
        changed = [
            item for item in self.overrides if item.lstrip("+~").startswith(("attention.", "projection@", "model."))
        ]
        return f"{self.attention} ({', '.join(changed)})" if changed else self.attention

    @property
    def dataset(self) -> str:
        """How tables name the data: the task, and the stand-in's own name where it is one."""
        return f"{self.task} (stand-in: {self.data['dataset']})" if self.data.get("stand_in") else self.task
