"""Owns the manual pages: out of three Debian packages, or the committed part of them; and a text task made of them.

The packages install one page under many names (accept.2 is accept4.2); such copies are merged here. Unmerged, 55 % of
the validation and 46 % of the test positives of the pairs would be two texts that training has seen.
"""

import gzip
import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow.parquet

from data.base import SPLITS, DataError, Split
from data.roff import is_stub, read_roff
from data.sources import fetch_debian, require_sha256, unpack_debian

MIN_BYTES = 200  # shorter pages say nothing
VAL_SHARE, TEST_SHARE = 0.08, 0.08  # of the pages; about twice that of the pairs

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_PAGES = EMBEDDED / "retrieval_pages.parquet"
EMBEDDED_PAGES_SHA256 = "0b05d10ab2b77200342eb371317ff3006836bdb39a04698f71c3bd900d29bad5"
EMBEDDED_BYTES = 4000  # of each committed page

EXCERPT_BYTES, MIN_EXCERPT_BYTES = 1000, 500
TEXT_VAL_SHARE, TEXT_TEST_SHARE = 0.15, 0.15  # of the pages
_BODY = b"\nDESCRIPTION\n"


@dataclass(frozen=True)
class DebianPackage:
    name: str
    version: str
    sha256: str


PACKAGES = (
    DebianPackage("manpages", "6.03-2", "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91"),
    DebianPackage("manpages-dev", "6.03-2", "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838"),
    DebianPackage("freebsd-manpages", "12.2-1", "2d4a9606bd59d4c71e6d8355dee3d2624b0ebdab79d3ab5e9169ed7fbb0c197a"),
)

PageKey = tuple[str, str, str]  # name, section digit, package


@dataclass(frozen=True)
class Page:
    """One document. `names`: every key under which this text is installed; `path`: inside the package's man folder;
    `source`: the roff text it was made from (its comments hold the licence); `references`: keys in its SEE ALSO."""

    names: tuple[PageKey, ...]
    path: str
    text: bytes
    source: str
    references: tuple[PageKey, ...]

    @property
    def key(self) -> PageKey:
        return self.names[0]

    @cached_property
    def split(self) -> Split:
        """Drawn from the hash of the page's first name, so that adding a package moves no page."""
        return _drawn_split("/".join(self.key), VAL_SHARE, TEST_SHARE)


@contextmanager
def unpacked_packages(folder: Path) -> Iterator[dict[str, Path]]:
    """Package name -> root folder of its files, for the time of a `with` block; the packages stay in `folder`."""
    debs = {each.name: fetch_debian(each.name, each.version, each.sha256, folder) for each in PACKAGES}
    with tempfile.TemporaryDirectory(prefix=".manpages.", dir=folder) as temporary:
        roots = {name: Path(temporary) / name for name in debs}
        for name, deb in debs.items():
            unpack_debian(deb, roots[name])
        yield roots


def fetch_pages(folder: Path) -> list[Page]:
    """The pages of the packages, which are fetched into `folder` where they are not there yet. Raises DataError."""
    with unpacked_packages(folder) as roots:
        return read_pages(roots)


def read_pages(roots: dict[str, Path]) -> list[Page]:
    """Pages of unpacked packages, name -> root folder, in the order of their keys; copies of one text are one page."""
    copies: dict[tuple[str, bytes], list[tuple[PageKey, str, str, tuple[PageKey, ...]]]] = defaultdict(list)
    for package, root in roots.items():
        for path in _page_files(root):
            source = _read_source(path)
            if is_stub(source):
                continue
            name, _, section = path.name.removesuffix(".gz").rpartition(".")
            page = read_roff(source)
            references = tuple((other, digit, package) for other, digit in page.references)
            if len(text := page.text.encode()) >= MIN_BYTES:
                place = f"{path.parent.name}/{path.name.removesuffix('.gz')}"
                copies[package, text].append(((name, section[:1], package), place, source, references))
    pages = []
    for (_, text), found in copies.items():
        found.sort()
        _, place, source, references = found[0]
        pages.append(Page(tuple(key for key, *_ in found), place, text, source, references))
    return sorted(pages, key=lambda page: page.key)


def _page_files(root: Path) -> Iterator[Path]:
    folder = root / "usr" / "share" / "man"
    found = [path for path in sorted(folder.glob("man[0-9]*/*")) if path.is_file() and not path.is_symlink()]
    if not found:
        raise DataError(f"{folder}: no manual pages. Unpack the Debian package there again.")
    yield from found


def _read_source(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Unpack the Debian package again.") from error
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")  # pages older than UTF-8


@dataclass(frozen=True)
class EmbeddedPage:
    """One committed page: its key and the first EMBEDDED_BYTES bytes of its text."""

    key: PageKey
    text: bytes


def load_embedded_pages() -> list[EmbeddedPage]:
    """The committed pages, in the order that the committed pairs count. Raises DataError when the file is another."""
    require_sha256(EMBEDDED_PAGES, EMBEDDED_PAGES_SHA256)
    table = pyarrow.parquet.read_table(EMBEDDED_PAGES, columns=["name", "section", "package", "text"]).to_pylist()
    return [EmbeddedPage((row["name"], row["section"], row["package"]), row["text"]) for row in table]


def text_fallback() -> dict[str, tuple[list[bytes], list[int]]]:
    """A two-class text task out of the committed pages: is an excerpt from a FreeBSD (1) or a Linux (0) manual page?

    Per split (train, val, test) the excerpts and their labels, as many of either class. An excerpt is a thousand bytes
    from the body of a page, below the headings that would tell; the excerpts of one page stay in one split."""
    found: dict[str, tuple[list[tuple[str, bytes]], ...]] = {split: ([], []) for split in SPLITS}
    for page in load_embedded_pages():
        label = int(page.key[2].startswith("freebsd"))
        split = _drawn_split("text/" + "/".join(page.key), TEXT_VAL_SHARE, TEXT_TEST_SHARE)
        body = page.text.partition(_BODY)[2]
        for start in range(0, len(body), EXCERPT_BYTES):
            excerpt = body[start : start + EXCERPT_BYTES]
            if len(excerpt) >= MIN_EXCERPT_BYTES:
                found[split][label].append((digest("/".join((*page.key, str(start)))), excerpt))
    served = {}
    for split, classes in found.items():
        kept = min(map(len, classes))
        rows = sorted((order, text, label) for label in (0, 1) for order, text in sorted(classes[label])[:kept])
        served[split] = ([text for _, text, _ in rows], [label for *_, label in rows])
    return served


def _drawn_split(name: str, val_share: float, test_share: float) -> Split:
    place = int(digest(name)[:8], 16) / 2**32
    return "test" if place < test_share else "val" if place < test_share + val_share else "train"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
