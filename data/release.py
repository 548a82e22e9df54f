"""Owns how the benchmark's released archive gets here: from the first mirror that delivers it, resumed, checked, unpacked."""

import logging
from collections.abc import Sequence
from pathlib import Path

from data.archive import FOLDERS, extract_release, release_archive
from data.base import DataError
from data.sources import download, sha256_file

log = logging.getLogger(__name__)


class Release:
    """lra_release.gz of google-research/long-range-arena and the folders that are wanted of it."""

    def __init__(self, *, datasets: str, urls: Sequence[str], sha256: str | None, folders: Sequence[str]) -> None:
        """`urls`: mirrors, in order. `sha256`: of the archive; None: that of the first download, recorded beside it."""
        unknown = sorted(set(folders) - set(FOLDERS))
        if unknown or not folders:
            raise DataError(f"job.release.folders={list(folders)}; choose from {', '.join(FOLDERS)}")
        self.datasets, self.urls, self.sha256, self.folders = Path(datasets), list(urls), sha256, tuple(folders)

    def bring(self) -> Path:
        """The folder that holds the release, complete. An archive that the user brought is taken; folders that are there
        are left alone. Raises DataError naming every mirror's failure, and for an archive that is cut or hostile."""
        target = release_archive(self.datasets) or self.datasets / "downloads" / "lra_release.gz"
        if not target.is_file():
            log.info("fetching %s (7.7 GB); interrupted, the same command goes on", target.name)
        archive = download(self.urls, target, self.sha256)
        log.info("%s: %.2f GB, SHA-256 %s", archive, archive.stat().st_size / 1e9, sha256_file(archive))
        log.info("unpacking %s", ", ".join(self.folders))
        return extract_release(archive, self.datasets, only=self.folders)
