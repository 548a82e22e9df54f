"""Owns the making of data/embedded/retrieval*: the manual pages whose licence is clear and permissive, and their pairs.

    python -m data.embed_retrieval <folder for the Debian packages>

writes the same tables on every machine, and prints the SHA-256 of each file: they are pinned in data.manpages and
data.manpage_pairs (another release of pyarrow may lay out equal tables in other bytes).
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from data.manpage_pairs import EMBEDDED_PAIRS, Pair, make_pairs, pair_list_sha256
from data.manpages import EMBEDDED, EMBEDDED_BYTES, EMBEDDED_PAGES, PACKAGES, Page, read_pages, unpacked_packages
from data.sources import sha256_file

NOTICE = EMBEDDED / "retrieval_NOTICE.txt"
COPYRIGHT = {"manpages": "manpages", "manpages-dev": "manpages", "freebsd-manpages": "freebsd-manpages"}

# Licences by which a page may be committed here, as its own header names them -> as debian/copyright does.
CLEAR = {
    "BSD-2-Clause": "BSD-2-clause",
    "BSD-2-Clause-FreeBSD": "BSD-2-Clause-FreeBSD",
    "BSD-3-Clause": "BSD-3-clause",
    "BSD-4-Clause-UC": "BSD-4-clause",
    "MIT": "Expat",
    "Linux-man-pages-copyleft": "Linux-man-pages-copyleft",
}

_EXPLANATION = """\
retrieval_pages.parquet holds the first {bytes:,} bytes of the plain text of {pages:,} manual pages, without their SEE
ALSO sections, and retrieval_pairs.parquet pairs of them. data/embed_retrieval.py made both from these Debian packages:

{packages}

Each page stays under its own licence, not under that of this project. The columns "licence" and "notice" of
retrieval_pages.parquet give the licence of each page and, unabridged, the header of its source with its copyright
notices; the column "path" is its place below /usr/share/man in its package. The pages were changed: formatting and the
section SEE ALSO were removed, and what follows the first {bytes:,} bytes was cut off.

Only pages are included whose header carries one of the licences below, with debian/copyright agreeing; pages under the
GNU GPL, and pages with no licence or with another licence in their header, were left out:

{licences}

The texts of these licences follow, from the files debian/copyright of the packages.
"""


def header_of(source: str) -> str:
    """The comments at the head of a page, above its first macro: copyright notices and licence."""
    lines = []
    for line in source.splitlines():
        if re.match(r"[.']\s*(TH|Dd|Dt|SH|Sh)\b", line):
            break
        if comment := re.match(r"[.'](?:\\\"|\s*$)\s?(.*)", line):
            lines.append(comment[1].rstrip())
    return "\n".join(lines).strip()


def licence_of(header: str) -> str | None:
    """The licence that a header states, by its SPDX tag or by its words; None when it is none of the clear ones."""
    if tags := re.findall(r"SPDX-License-Identifier:\s*(.+)", header):
        names = sorted({name for tag in tags for name in re.split(r"\s+AND\s+", tag.strip())})
        return " AND ".join(names) if set(names) <= set(CLEAR) else None
    words = " ".join(header.split())
    if not re.search(r"Redistribution and use in source .{0,60}with or without modification, are permitted", words):
        return None
    if "must retain the above copyright" not in words:
        return None
    if "dvertising material" in words:
        return "BSD-4-Clause"
    return "BSD-3-Clause" if re.search(r"Neither the name|may not be used to endorse", words) else "BSD-2-Clause"


def declared_licences(copyright_text: str) -> dict[str, str]:
    """File -> licence of the Files paragraphs of a debian/copyright; "*" is the default."""
    declared = {}
    for paragraph in copyright_text.split("\n\n"):
        files = re.search(r"^Files:((?:.*\n)(?:[ \t]+.*\n)*)", paragraph + "\n", re.MULTILINE)
        licence = re.search(r"^License:\s*(.+)$", paragraph, re.MULTILINE)
        if files and licence:
            declared |= {name: licence[1].strip() for name in files[1].split()}
    return declared


def is_agreed(page: Page, licence: str, declared: dict[str, str]) -> bool:
    """Whether debian/copyright says of the page what its header says. FreeBSD's pages are declared together, as BSD."""
    if "freebsd" in page.key[2]:
        return licence.startswith("BSD")
    names = set(re.split(r"\s+and\s+", declared.get(page.path, declared["*"])))
    return names == {CLEAR.get(name, name) for name in licence.split(" AND ")}


def licence_texts(copyright_text: str, names: set[str]) -> list[str]:
    """The stand-alone License paragraphs of these names."""
    paragraphs = (paragraph.strip("\n") for paragraph in copyright_text.split("\n\n"))
    found = {}
    for paragraph in paragraphs:
        title = re.match(r"License:\s*(.+)", paragraph)
        if title and title[1].strip() in names:
            found[title[1].strip()] = paragraph
    return list(found.values())


def pages_table(kept: Sequence[tuple[Page, str]]) -> pa.Table:
    rows = [
        {
            "name": page.key[0],
            "section": page.key[1],
            "package": page.key[2],
            "path": page.path,
            "licence": licence,
            "notice": header_of(page.source),
            "text": page.text[:EMBEDDED_BYTES],
        }
        for page, licence in kept
    ]
    types: dict[str, Any] = dict.fromkeys(rows[0], pa.string()) | {"text": pa.binary()}
    return pa.Table.from_pylist(rows, schema=pa.schema(list(types.items())))


def pairs_table(pairs: Sequence[Pair]) -> pa.Table:
    types = {"left": pa.int16(), "right": pa.int16(), "label": pa.int8(), "split": pa.string()}
    rows = [{name: getattr(pair, name) for name in types} for pair in pairs]
    return pa.Table.from_pylist(rows, schema=pa.schema(list(types.items())))


def notice(kept: Sequence[tuple[Page, str]], copyrights: dict[str, str]) -> str:
    used = sorted({licence for _, licence in kept})
    packages = (f"  {package.name} {package.version}, SHA-256 {package.sha256}" for package in PACKAGES)
    head = _EXPLANATION.format(
        bytes=EMBEDDED_BYTES,
        pages=len(kept),
        packages="\n".join(packages),
        licences="\n".join(f"  {name}: {sum(each == name for _, each in kept)} pages" for name in used),
    )
    names = {CLEAR.get(part, part) for name in used for part in name.split(" AND ")}
    linux = "\n\n".join(licence_texts(copyrights["manpages"], names))
    freebsd = copyrights["freebsd-manpages"].strip()
    return f"{head}\n== manpages and manpages-dev ==\n\n{linux}\n\n== freebsd-manpages ==\n\n{freebsd}\n"


def main(folder: Path) -> None:
    with unpacked_packages(folder) as roots:
        pages = read_pages(roots)
        names = set(COPYRIGHT.values())
        copyrights = {name: (roots[name] / "usr/share/doc" / name / "copyright").read_text() for name in names}
    declared = {name: declared_licences(text) for name, text in copyrights.items()}
    kept = []
    for page in pages:
        licence = licence_of(header_of(page.source))
        if licence and is_agreed(page, licence, declared[COPYRIGHT[page.key[2]]]):
            kept.append((page, licence))
    pairs = make_pairs([page for page, _ in kept])
    EMBEDDED.mkdir(exist_ok=True)
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 22, "data_page_size": 1 << 26}
    options |= {"row_group_size": 1 << 20, "write_batch_size": 1 << 20, "store_schema": False}
    dictionaries = ["package", "licence", "notice", "section"]
    pyarrow.parquet.write_table(pages_table(kept), EMBEDDED_PAGES, use_dictionary=dictionaries, **options)
    pyarrow.parquet.write_table(pairs_table(pairs), EMBEDDED_PAIRS, use_dictionary=["split"], **options)
    NOTICE.write_text(notice(kept, copyrights))
    for path in (EMBEDDED_PAGES, EMBEDDED_PAIRS, NOTICE):
        print(f"{sha256_file(path)}  {path.stat().st_size:>9,} bytes  {path.name}")
    counts = {split: sum(pair.split == split for pair in pairs) for split in ("train", "val", "test")}
    print(f"{len(kept)} of {len(pages)} pages; pairs {counts}; {pair_list_sha256([p.key for p, _ in kept], pairs)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
