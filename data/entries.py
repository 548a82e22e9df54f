"""Owns the way from a cache folder to served splits: take what is there if its bytes are sound, else make it."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from data.base import DataError, Manifest
from data.encoded import EncodedSplit, load_cache, save_cache, split_sha256

Prepared = tuple[Manifest, dict[str, EncodedSplit]]

log = logging.getLogger(__name__)


def serve(folder: Path, build: Callable[[], Prepared]) -> Prepared:
    """The sound cache entry `folder`, or what `build` makes, written there and mapped back. Raises DataError."""
    found = load_sound(folder)
    if found is not None:
        return found
    manifest, splits = build()
    try:
        save_cache(folder, manifest.as_dict(), splits)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error}); free some room, or give LRA_DATASETS (paths.datasets) a writable folder"
        ) from error
    found = load_sound(folder)
    if found is None:
        raise DataError(f"{folder} does not hold what was just written to it; check the disk")
    return found


def load_sound(folder: Path) -> Prepared | None:
    """The cache entry when its bytes have the SHA-256 of its manifest. A damaged one is reported and removed."""
    if not folder.exists():
        return None
    try:
        found = load_cache(folder)
        if found is not None:
            manifest, splits = Manifest(**found[0]), found[1]
            if manifest.sha256 == {split: split_sha256(folder, split) for split in splits}:
                return manifest, splits
        fault = "no manifest.json" if found is None else "its checksums are not those of its manifest"
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:  # what cut files raise
        fault = f"{type(error).__name__}: {error}"
    log.warning("the cache entry %s is damaged (%s); it is made again", folder, fault)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as grave:
            folder.rename(Path(grave) / folder.name)
    except FileNotFoundError:  # another process was faster
        pass
    except OSError as error:
        raise DataError(f"{folder} is damaged ({fault}) and cannot be removed: {error}; remove it by hand") from error
    return None
