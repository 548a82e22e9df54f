"""Owns the ledger: one JSON file per run, written by atomic rename, and the lock that lets one process own a run."""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lra.records import RunRecord


class RunInProgress(RuntimeError):
    """Another process is at work on this very run."""


def write_atomically(path: Path, content: bytes) -> None:
    """Temporary file beside the target, flushed to disk, renamed: a reader sees the old file or the new one, whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _naming(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _naming(path, error) from error
        raise


def _naming(path: Path, error: OSError) -> OSError:
    """The same error with the path that the user knows: a write names none, and a temporary name helps nobody."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def remove_leftovers(path: Path) -> None:
    """Delete what a process that was killed inside `write_atomically(path, ...)` left. Only for the path's owner."""
    for temporary in path.parent.glob(f".{path.name}.*"):
        temporary.unlink(missing_ok=True)


class Ledger:
    """`<runs>/ledger/<run_id>.json`."""

    def __init__(self, runs: str | Path) -> None:
        self.runs = Path(runs).expanduser()
        self.folder = self.runs / "ledger"

    def path(self, run_id: str) -> Path:
        return self.folder / f"{run_id}.json"

    def checkpoint(self, run_id: str) -> Path:
        """Where a run that is not finished keeps its state; gone once its record is written."""
        return self.runs / "checkpoints" / f"{run_id}.pt"

    def find(self, run_id: str) -> RunRecord | None:
        """The record of this run, or None. A damaged record raises ValueError with its path and advice."""
        path = self.path(run_id)
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        try:
            return RunRecord.from_json(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}. Delete the file to run this cell again.") from error

    def write(self, record: RunRecord) -> Path:
        path = self.path(record.run_id)
        write_atomically(path, record.to_json().encode())
        return path

    def read_all(self) -> tuple[list[RunRecord], list[str]]:
        """All readable records in order of their file names, and one line per file that could not be read."""
        return read_records(self.folder)

    def owner(self, run_id: str) -> str | None:
        """Who is at work on this run ("process 12 on host"), or None."""
        try:
            with open(self._lock(run_id)) as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return self._lock(run_id).read_text().strip() or "another process"
        return None

    def _lock(self, run_id: str) -> Path:
        return self.folder / f".{run_id}.lock"

    @contextmanager
    def claim(self, run_id: str) -> Iterator[None]:
        """Own this run until the block ends; the operating system gives the claim back if the process dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self._lock(run_id), "a+") as lock:
            if not _lock_patiently(lock):
                lock.seek(0)
                raise RunInProgress(
                    f"run {run_id} is already being worked on by {lock.read().strip() or 'another process'}; "
                    "nothing was done. Wait for it, or stop it first."
                )
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {os.uname().nodename}")
            lock.flush()
            yield


def _lock_patiently(lock: TextIO) -> bool:
    """A glance of `Ledger.owner` at the same lock takes microseconds: try again before giving up."""
    for _ in range(5):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


def read_records(folder: Path) -> tuple[list[RunRecord], list[str]]:
    """Every record in a folder, and a line per damaged file: a table must show that something was left out."""
    records, damaged = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(RunRecord.from_json(path.read_text()))
        except (ValueError, OSError) as error:
            damaged.append(f"{path}: {error}")
    return records, damaged
