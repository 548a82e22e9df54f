"""Owns the released pairs of Retrieval: new_aan_pairs.{train,eval,test}.tsv, read line by line.

A row is label, id1, id2, text1, text2 between tabs; there is no header, and quotes are bytes like any others, as in
google-research/long-range-arena (lra_benchmarks/matching/input_pipeline.py).
"""

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.archive import release_folders
from data.base import DataError, Split

FILES: dict[Split, str] = {
    "train": "new_aan_pairs.train.tsv",
    "val": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
COLUMNS = ("label", "id1", "id2", "text1", "text2")
MAX_LINE = 1 << 26  # bytes; two papers are less than a hundredth of it
_LABELS = {0.0: 0, 1.0: 1}


@dataclass(frozen=True)
class Row:
    """One pair: label 1 when one paper cites the other; the texts are bytes, already cut."""

    label: int
    first: bytes
    second: bytes


def find_files(datasets: Path) -> dict[Split, Path] | None:
    """The three files in the first folder that has them all, or None."""
    for folder in release_folders(datasets, "tsv_data"):
        paths = {split: folder / name for split, name in FILES.items()}
        if all(path.is_file() for path in paths.values()):
            return paths
    return None


def expected_folder(datasets: Path) -> Path:
    """Where the files should be: the first known folder that has any of them, or where the release unpacks."""
    folders = release_folders(datasets, "tsv_data")
    return next((each for each in folders if any((each / name).is_file() for name in FILES.values())), folders[0])


class AanFile:
    """One file. Iterate for its rows; afterwards `sha256` is the digest of its bytes and `rows` their number."""

    def __init__(self, path: Path, max_len: int) -> None:
        """`max_len`: each text is cut to its first max_len bytes."""
        self.path, self._max_len = path, max_len
        self.rows = 0
        self.sha256 = ""

    def __iter__(self) -> Iterator[Row]:
        """Raises DataError naming file, line and remedy for whatever is not a row."""
        digest = hashlib.sha256()
        self.rows = 0
        try:
            opened = open(self.path, "rb")  # noqa: SIM115
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error}).") from error
        with opened as file:
            while line := file.readline(MAX_LINE):
                digest.update(line)
                self.rows += 1
                yield self._row(line)
        if not self.rows:
            raise DataError(f"{self.path}: the file is empty. Unpack it from the LRA release again.")
        self.sha256 = digest.hexdigest()

    def _row(self, line: bytes) -> Row:
        if not line.endswith(b"\n"):
            longer = len(line) == MAX_LINE
            what = f"longer than {MAX_LINE:,} bytes" if longer else "cut off: it does not end in a line break"
            raise self._error(f"the line is {what}. Unpack the file from the LRA release again")
        if self.rows == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        cells = line[:-1].removesuffix(b"\r").split(b"\t")
        if len(cells) != len(COLUMNS):
            raise self._error(f"{len(cells)} columns between tabs, expected {len(COLUMNS)}: {', '.join(COLUMNS)}")
        try:
            label = _LABELS[float(cells[0])]
        except (ValueError, KeyError):
            raise self._error(f"the label is {cells[0][:40]!r}, expected 0.0 or 1.0") from None
        return Row(label, cells[3][: self._max_len], cells[4][: self._max_len])

    def _error(self, what: str) -> DataError:
        return DataError(f"{self.path}, line {self.rows}: {what}.")
