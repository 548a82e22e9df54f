"""Owns the Retrieval task: does one paper cite the other, byte by byte (arXiv:2011.04006, section 2.3); its stand-ins."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data import aan
from data.archive import HOW_TO_GET, extract_release, release_archive
from data.base import SPLITS, DataError, Manifest, Missing, Split, Task
from data.byte_text import NUM_IDS, byte_ids, text_of
from data.encoded import key_of
from data.encoded_writer import CacheWriter, serve_streamed
from data.entries import Prepared
from data.manpage_pairs import (
    DEBIAN_PAGES_SHA256,
    DEBIAN_PAIRS_SHA256,
    EMBEDDED_PAIRS_SHA256,
    debian_pairs,
    embedded_pairs,
)
from data.manpages import EMBEDDED_BYTES, EMBEDDED_PAGES_SHA256, PACKAGES
from data.sources import verified
from data.subsets import balanced_subset

DATASETS = {"official": "retrieval", "debian": "retrieval-manpages", "embedded": "retrieval-manpages-quick"}
SOURCES = tuple(DATASETS)
ENCODING = 1  # part of the cache key; raise it when the bytes of an entry change

Example = tuple[Split, bytes, bytes, int]


class Retrieval(Task):
    """Two classes: 1 when one document of the pair refers to the other. Ids: padding 0, else byte + 1; a document that
    is longer than `max_len` keeps its head. The two documents of a pair are encoded independently.

    Sources: "official", the released AAN pairs; "debian", retrieval-manpages (stand-in: manual pages and their SEE
    ALSO); "embedded", retrieval-manpages-quick (stand-in: those of them whose licence lets us commit them)."""

    name = "retrieval"
    num_classes = 2
    num_sequences = 2

    def __init__(
        self,
        *,
        source: str,
        datasets: str,
        vocab_size: int,
        max_len: int,
        official_rows: Mapping[str, int] | None,
        num_train: int | None,
        num_val: int | None,
        num_test: int | None,
        subset_seed: int,
    ) -> None:
        """`official_rows`: rows that the released files have, per split; other files are refused. None: any number.
        `num_train`, `num_val`, `num_test`: at most so many pairs, class-balanced, drawn with `subset_seed`; None: all."""
        super().__init__(source=source, vocab_size=vocab_size, max_len=max_len, datasets=datasets)
        if source not in DATASETS:
            raise DataError(f"task.source={source!r} is unknown for retrieval; choose one of {', '.join(DATASETS)}")
        if vocab_size < NUM_IDS:
            raise DataError(f"task.vocab_size={vocab_size}: retrieval uses {NUM_IDS} ids")
        self.limits: dict[str, int | None] = {"train": num_train, "val": num_val, "test": num_test}
        for key, value in {"max_len": max_len, **{f"num_{split}": n for split, n in self.limits.items()}}.items():
            if value is not None and value < 1:
                raise DataError(f"task.{key}={value}: must be at least 1")
        if source == "embedded" and max_len > EMBEDDED_BYTES:
            raise DataError(
                f"task.max_len={max_len}: the embedded pages hold {EMBEDDED_BYTES} bytes; use source=debian"
            )
        if official_rows is not None and set(official_rows) != set(SPLITS):
            raise DataError(f"task.official_rows has keys {sorted(official_rows)}; give {', '.join(SPLITS)}, or null")
        self.official_rows = None if official_rows is None else dict(official_rows)
        self.subset_seed = subset_seed

    @property
    def _downloads(self) -> Path:
        return self.datasets / "downloads"

    def check(self) -> list[Missing]:
        if self.source == "official":
            return self._missing_official()
        if self.source == "embedded" or self._entry(self._parameters()).is_dir():
            return []
        missing = []
        for package in PACKAGES:
            file = f"{package.name}_{package.version}_all.deb"
            if not verified(self._downloads, f"{package.name}_*.deb", package.sha256):
                how = (
                    f"it is fetched at preparation by `apt-get download {package.name}={package.version}`, "
                    f"or bring it by hand from https://snapshot.debian.org/package/{package.name}/"
                )
                missing.append(Missing(file, self._downloads / file, how, fetchable=True))
        return missing

    def _missing_official(self) -> list[Missing]:
        if aan.find_files(self.datasets) or release_archive(self.datasets):
            return []
        folder = aan.expected_folder(self.datasets)
        return [
            Missing(name, folder / name, HOW_TO_GET) for name in aan.FILES.values() if not (folder / name).is_file()
        ]

    def _prepare(self) -> Prepared:
        if self.source == "official":
            self._unpack_official()
        if not self._limited:
            return self._complete()
        return serve_streamed(
            self.entries()[0], SPLITS, self.num_sequences, lambda cache: self._write_subset(cache, self._complete())
        )

    def _complete(self) -> Prepared:
        return serve_streamed(self._entry(self._parameters()), SPLITS, self.num_sequences, self._write_all)

    @property
    def _limited(self) -> bool:
        return any(limit is not None for limit in self.limits.values())

    def entries(self) -> list[Path]:
        if self.source == "official" and aan.find_files(self.datasets) is None:
            return []
        subset = {"limits": self.limits, "subset_seed": self.subset_seed} if self._limited else {}
        return [self._entry(self._parameters() | subset)]

    def describe(self, sequence: np.ndarray) -> dict[str, Any]:
        return {"text": text_of(sequence)}

    def _unpack_official(self) -> None:
        if aan.find_files(self.datasets):
            return
        if archive := release_archive(self.datasets):
            extract_release(archive, self.datasets, only=("tsv_data",))
        if not aan.find_files(self.datasets):
            folder = aan.expected_folder(self.datasets)
            absent = [name for name in aan.FILES.values() if not (folder / name).is_file()]
            raise DataError(
                f"retrieval: {folder} lacks {', '.join(absent)}; {HOW_TO_GET}, "
                "or choose a stand-in: task.source=debian or embedded"
            )

    def _parameters(self) -> dict[str, Any]:
        """All that the bytes of the complete encoded set depend on."""
        served = {"task": self.name, "encoding": ENCODING, "source": self.source, "max_len": self.max_len}
        if self.source == "debian":
            return served | {"pairs": DEBIAN_PAIRS_SHA256, "pages": DEBIAN_PAGES_SHA256}
        if self.source == "embedded":
            return served | {"pairs": EMBEDDED_PAIRS_SHA256, "pages": EMBEDDED_PAGES_SHA256}
        paths = aan.find_files(self.datasets) or {}
        stats = {path.name: path.stat() for path in paths.values()}
        files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}  # gigabytes: not hashed anew
        return served | {"files": files, "rows": self.official_rows}

    def _entry(self, parameters: Mapping[str, Any]) -> Path:
        return self.datasets / "encoded" / f"retrieval-{key_of(parameters)}"

    def _write_all(self, cache: CacheWriter) -> Manifest:
        details: dict[str, Any] = {"max_len": self.max_len}
        examples = self._official(details) if self.source == "official" else self._manpages(details)
        for split, first, second, label in examples:
            cache[split].append([byte_ids(first, self.max_len), byte_ids(second, self.max_len)], label)
        counts, sha256 = cache.finish_splits()
        stand_in = self.source != "official"
        return Manifest(self.name, DATASETS[self.source], self.source, stand_in, counts, sha256, details)

    def _official(self, details: dict[str, Any]) -> Iterator[Example]:
        paths = aan.find_files(self.datasets)
        assert paths is not None  # _unpack_official saw them
        details["files_sha256"] = {}
        for split in SPLITS:
            file = aan.AanFile(paths[split], self.max_len)
            for row in file:
                yield split, row.first, row.second, row.label
            if self.official_rows is not None and file.rows != self.official_rows[split]:
                raise DataError(
                    f"{file.path}: {file.rows:,} rows, the released file has {self.official_rows[split]:,}. Unpack it "
                    f"again; for files of your own set task.official_rows=null"
                )
            details["files_sha256"][file.path.name] = file.sha256

    def _manpages(self, details: dict[str, Any]) -> Iterator[Example]:
        if self.source == "debian":
            texts, pairs = debian_pairs(self._downloads)
            details |= {"pairs_sha256": DEBIAN_PAIRS_SHA256, "pages_sha256": DEBIAN_PAGES_SHA256}
            details |= {"packages": {f"{package.name} {package.version}": package.sha256 for package in PACKAGES}}
        else:
            texts, pairs = embedded_pairs()
            details |= {"pairs_sha256": EMBEDDED_PAIRS_SHA256, "pages_sha256": EMBEDDED_PAGES_SHA256}
            details |= {"bytes_per_page": EMBEDDED_BYTES}
        for pair in pairs:
            yield pair.split, texts[pair.left], texts[pair.right], pair.label

    def _write_subset(self, cache: CacheWriter, complete: Prepared) -> Manifest:
        whole, splits = complete
        for split, data in splits.items():
            for row in balanced_subset(np.asarray(data.labels), self.limits[split], self.subset_seed):
                edges = data.offsets[row * self.num_sequences : (row + 1) * self.num_sequences + 1]
                sequences = [data.tokens[start:end] for start, end in pairwise(edges)]
                cache[split].append(sequences, int(data.labels[row]))
        counts, sha256 = cache.finish_splits()
        cut = any(counts[split] < whole.counts[split] for split in ("train", "test"))
        return Manifest(
            self.name,
            f"{whole.dataset}-subset" if cut else whole.dataset,
            self.source,
            whole.stand_in or cut,
            counts,
            sha256,
            {**whole.details, "subset_of": dict(whole.counts), "subset_seed": self.subset_seed},
        )
