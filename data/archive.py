"""Owns the released archive of the benchmark: where its folder is, and how lra_release.gz is unpacked without harm.

The file is a gzipped tar in spite of its bare suffix (about 7.7 GB) and nests its folder in itself:
lra_release/lra_release/{listops-1000,tsv_data,pathfinder32,pathfinder64,pathfinder128,pathfinder256}/...
(google-research/long-range-arena, README.md; arXiv:2011.04006).
"""

import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from data.base import DataError

ARCHIVE_NAMES = ("lra_release.gz", "lra-release.gz", "lra_release.tar.gz", "lra_release.tar")
FOLDERS = ("listops-1000", "tsv_data", "pathfinder32", "pathfinder64", "pathfinder128", "pathfinder256")
HOW_TO_GET = (
    "fetch lra_release.gz of google-research/long-range-arena with `python run.py job=release`, or put it into the data "
    "folder, or unpack it there"
)
ROOTS = ("lra_release/lra_release", "lra_release", ".")


def release_folders(datasets: Path, folder: str) -> list[Path]:
    """Where one of the release's folders may lie: the archive nests them twice, which people undo. Most likely first."""
    return [datasets / root / folder for root in ROOTS]


def release_archive(datasets: Path) -> Path | None:
    """The archive file where a user may have put it, in `datasets` or its downloads folder, or None."""
    places = (folder / name for folder in (datasets, datasets / "downloads") for name in ARCHIVE_NAMES)
    return next((place for place in places if place.is_file()), None)


def extract_release(archive: Path, datasets: Path, only: Collection[str] = FOLDERS) -> Path:
    """Unpack the folders `only` of the release into <datasets>/lra_release and return that. Folders appear complete or
    not at all; one that is there already is left as it is. Raises DataError for an archive that is cut, or that holds
    anything but plain files inside its own folder: absolute or climbing paths, links, devices."""
    target = datasets / "lra_release"
    target.mkdir(parents=True, exist_ok=True)
    wanted = {name for name in only if not (target / name).exists()}
    with tempfile.TemporaryDirectory(prefix=".extract.", dir=target) as temporary:
        try:
            _extract(archive, Path(temporary), wanted)
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise DataError(
                f"{archive}: unpacking failed ({error}); fetch it again if it is cut, free room if the disk is full"
            ) from error
        for folder in sorted(Path(temporary).iterdir()):
            os.rename(folder, target / folder.name)
    absent = sorted(name for name in only if not (target / name).is_dir())
    if absent:
        raise DataError(f"{archive}: holds no folder {', '.join(absent)}; is it the release of the benchmark?")
    return target


def _extract(archive: Path, folder: Path, wanted: Collection[str]) -> None:
    with tarfile.open(archive, mode="r|*") as tar:  # a stream: one pass, gzip or not
        for member in tar:
            path = _inner_path(archive, member)
            if not path.parts or path.parts[0] not in wanted or member.isdir():
                continue
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None  # it is a plain file
            with content, open(place, "wb") as file:  # our own permissions, owner and times
                shutil.copyfileobj(content, file)


def _inner_path(archive: Path, member: tarfile.TarInfo) -> PurePosixPath:
    """The member's path below the innermost lra_release. Raises DataError for what has no business in the archive."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise DataError(f"{archive}: member {member.name!r} points outside; the archive is not trusted, fetch another")
    if not (member.isreg() or member.isdir()):
        raise DataError(
            f"{archive}: member {member.name!r} is a link or a device; the archive is not trusted, fetch another"
        )
    parts = path.parts
    while parts and parts[0] == "lra_release":
        parts = parts[1:]
    return PurePosixPath(*parts)
