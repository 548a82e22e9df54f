"""The job that brings the released archive: mirrors, resumption, a folder at a time, and refusal."""

import io
import tarfile

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

from data.base import DataError
from lra.data_jobs import release
from tests.conftest import ROOT
from tests.data.test_sources import Server, server  # noqa: F401

FILES = {
    f"lra_release/lra_release/listops-1000/basic_{split}.tsv": b"Source\tTarget\r\n"
    + 20 * b"( ( ( [MAX 2 ) 9 ) ] )\t9\r\n"
    for split in ("train", "val", "test")
}


COUNTS = [f"task.num_{split}=20" for split in ("train", "val", "test")]


@pytest.fixture
def mirror(server: Server) -> Server:  # noqa: F811
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    server.content = packed.getvalue()
    return server


@pytest.fixture
def bring(tmp_path, monkeypatch):
    monkeypatch.setenv("LRA_DATASETS", str(tmp_path))

    def run(*overrides: str):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("config", overrides=["job=release", *overrides], return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            release(config)
            return config

    return run


def test_the_second_mirror_delivers_what_official_reads(mirror, bring, tmp_path, caplog):
    caplog.set_level("INFO")
    urls = f"job.release.urls=[{mirror.url('absent')},{mirror.url('lra_release.gz')}]"
    config = bring(urls, "job.release.folders=[listops-1000]", "task.source=official", *COUNTS)
    assert "SHA-256" in caplog.text
    assert (tmp_path / "downloads" / "lra_release.gz.sha256").is_file()
    assert instantiate(config.task).prepare().source == "official"
    bring(urls, "job.release.folders=[listops-1000]")
    assert len(mirror.requests) == 2  # nothing is fetched twice


def test_a_cut_connection_is_taken_up_again(mirror, bring, tmp_path):
    mirror.cut = 100
    with pytest.raises(DataError, match=r"(?s)the connection ended after 100 .* Bring the file and put it at"):
        bring(f"job.release.urls=[{mirror.url()}]", "job.release.folders=[listops-1000]")
    mirror.cut = None
    bring(f"job.release.urls=[{mirror.url()}]", "job.release.folders=[listops-1000]")
    assert mirror.requests[-1][1] == "bytes=100-"
    assert (tmp_path / "lra_release" / "listops-1000" / "basic_test.tsv").is_file()


def test_a_changed_archive_and_an_unknown_folder_are_refused(mirror, bring, tmp_path):
    with pytest.raises(Exception, match=r"job\.release\.folders=.*choose from listops-1000"):
        bring("job.release.folders=[listops]")
    bring(f"job.release.urls=[{mirror.url()}]", "job.release.folders=[listops-1000]")
    archive = tmp_path / "downloads" / "lra_release.gz"
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(DataError, match="SHA-256 is"):
        bring("job.release.folders=[listops-1000]")


def test_an_archive_brought_by_hand_is_unpacked_when_it_is_needed(mirror, bring, tmp_path):
    (tmp_path / "lra_release.gz").write_bytes(mirror.content)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        task = instantiate(
            compose("config", overrides=["task.source=official", *COUNTS, f"paths.datasets={tmp_path}"]).task
        )
    assert task.check() == [] and task.entries() == []
    assert task.prepare().source == "official" and task.entries()[0].is_dir()
