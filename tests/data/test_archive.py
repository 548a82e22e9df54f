"""Owns the tests of the release archive: nested folders come out right, and nothing gets outside."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from data.archive import extract_release, release_archive, release_folders
from data.base import DataError

GOOD = {
    "lra_release/lra_release/listops-1000/basic_train.tsv": b"Source\tTarget\r\n",
    "lra_release/lra_release/pathfinder32/curv_contour_length_14/imgs/0/sample_0.png": b"png",
    "lra_release/lra_release/README": b"not wanted",
}


def write_tar(path: Path, files: dict[str, bytes], extra: tarfile.TarInfo | None = None, compress: bool = True) -> Path:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mode = 0o4777
            tar.addfile(member, io.BytesIO(content))
        if extra is not None:
            tar.addfile(extra, io.BytesIO(b"x" * extra.size))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(stream.getvalue()) if compress else stream.getvalue())
    return path


@pytest.mark.parametrize("compress", [True, False])
def test_the_nested_release_is_unpacked_once_and_found(tmp_path: Path, compress: bool) -> None:
    archive = write_tar(tmp_path / "downloads" / "lra_release.gz", GOOD, compress=compress)
    assert release_archive(tmp_path) == archive
    root = extract_release(archive, tmp_path, only=("listops-1000", "pathfinder32"))
    assert root == tmp_path / "lra_release"
    assert root / "listops-1000" in release_folders(tmp_path, "listops-1000")
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {"listops-1000/basic_train.tsv", "pathfinder32/curv_contour_length_14/imgs/0/sample_0.png"}
    assert not (root / "listops-1000" / "basic_train.tsv").stat().st_mode & 0o7111  # no mode bits of the archive


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    own = tmp_path / "lra_release" / "listops-1000" / "basic_train.tsv"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    extract_release(write_tar(tmp_path / "lra_release.gz", GOOD), tmp_path, only=("listops-1000", "pathfinder32"))
    assert own.read_text() == "mine"


def test_a_release_that_lacks_a_wanted_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no folder tsv_data"):
        extract_release(write_tar(tmp_path / "lra_release.gz", GOOD), tmp_path, only=("listops-1000", "tsv_data"))


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def plain(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = 1
    return member


HOSTILE = {
    "climbing": plain("lra_release/lra_release/../../outside"),
    "climbing late": plain("lra_release/lra_release/listops-1000/../../../outside"),
    "absolute": plain("/tmp/outside"),
    "symbolic link": link("lra_release/lra_release/listops-1000/l", "/etc", tarfile.SYMTYPE),
    "hard link": link("lra_release/lra_release/listops-1000/l", "/etc/hostname", tarfile.LNKTYPE),
    "device": link("lra_release/lra_release/listops-1000/d", "", tarfile.CHRTYPE),
    "fifo": link("lra_release/lra_release/listops-1000/f", "", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_member_is_refused_and_nothing_is_kept(tmp_path: Path, name: str) -> None:
    datasets = tmp_path / "a" / "b" / "datasets"
    archive = write_tar(datasets / "lra_release.gz", GOOD, HOSTILE[name])
    with pytest.raises(DataError, match="not trusted"):
        extract_release(archive, datasets)
    assert list((datasets / "lra_release").iterdir()) == []
    assert not list(tmp_path.rglob("outside"))


def test_a_cut_archive_leaves_nothing_half_done(tmp_path: Path) -> None:
    files = {f"lra_release/lra_release/listops-1000/{n}": bytes([n]) * 5000 for n in range(50)}
    archive = write_tar(tmp_path / "lra_release.gz", files)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError, match="unpacking failed"):
        extract_release(archive, tmp_path, only=("listops-1000",))
    assert list((tmp_path / "lra_release").iterdir()) == []
    (tmp_path / "lra_release.gz").write_text("<html>403 Forbidden</html>")
    with pytest.raises(DataError, match="unpacking failed"):
        extract_release(archive, tmp_path, only=("listops-1000",))
