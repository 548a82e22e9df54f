"""Manual pages become plain text, their references become pairs, and no pair tells its label by one page alone."""

import gzip
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet
import pytest

from data import manpages
from data.base import SPLITS, DataError
from data.embed_retrieval import CLEAR, NOTICE, declared_licences, header_of, is_agreed, licence_of
from data.manpage_pairs import EMBEDDED_PAIRS, Pair, embedded_pairs, links, make_pairs
from data.manpages import EMBEDDED_BYTES, EMBEDDED_PAGES, Page, load_embedded_pages, read_pages, text_fallback
from data.roff import is_stub, read_roff, unescape

MAN = r"""'\" t
.\" Copyright (c) someone
.TH OPEN 2 2023-02-05 "Linux man-pages"
.SH NAME
open \- open a file
.SH DESCRIPTION
.BR open ()
uses
.IR path ,
see
.BR mmap (2)
and \fIelsewhere\fP. \" not this
.PP
.BI "int open(const char *" path ", int " flags );
.ig
not this either
..
.nf
    if (x \e y)
      z\(aqs;
.fi
.TS
tab(:);
l l.
A:B
T{
long
T}:D
.TE
.SH SEE ALSO
.BR close (2),
.BR mmap (2),
.BR err (3const)
.SH BUGS
None.
"""

MDOC = r""".\" Copyright (c) someone
.Dd May 1, 2020
.Dt VREF 9
.Os
.Sh NAME
.Nm vref , vrefl
.Nd take a reference
.Sh SYNOPSIS
.In sys/vnode.h
.Ft void
.Fn vref "struct vnode *vp" "int how"
.Ft int
.Fo bind
.Fa "int s" "int t"
.Fa "int u"
.Fc
.Sh DESCRIPTION
The
.Nm
function
.Pq see Xr malloc 9
takes
.Fa vp ,
.Dv NULL
or
.Op Fl a Ar file .
.Dq Quoted words ,
.Pa /dev/x Ns y
and
.Fx 4.0 .
.Bl -tag -width indent
.It Dv EINVAL
Bad.
.El
.Sh SEE ALSO
.Xr vput 9 ,
.Xr malloc 9
"""


def test_man_macros_become_plain_text() -> None:
    assert read_roff(MAN).text.split("\n") == [
        "NAME",
        "open - open a file",
        "DESCRIPTION",
        "open() uses path, see mmap and elsewhere.",
        "int open(const char *path, int flags);",
        "if (x \\ y)",
        "z's;",
        "A B",
        "long",
        "D",
        "BUGS",
        "None.",
    ]


def test_mdoc_macros_become_plain_text() -> None:
    assert read_roff(MDOC).text.split("\n") == [
        "NAME",
        "vref, vrefl - take a reference",
        "SYNOPSIS",
        "#include <sys/vnode.h>",
        "void vref(struct vnode *vp, int how)",
        "int bind(int s, int t, int u)",
        "DESCRIPTION",
        'The vref function (see malloc) takes vp, NULL or [-a file]. "Quoted words", /dev/xy and FreeBSD 4.0.',
        "EINVAL Bad.",
    ]


def test_references_are_those_of_see_also_alone() -> None:
    assert read_roff(MAN).references == (("close", "2"), ("mmap", "2"), ("err", "3"))
    assert read_roff(MDOC).references == (("vput", "9"), ("malloc", "9"))


@pytest.mark.parametrize(
    ("roff", "text"),
    [
        (r"\(lqa\(rq \[bu] \*(Gt\-\fBx\fP\f(CWy\s-1z\s0", '"a" * >-xyz'),
        (r"Andr\('e \[u00E9]", "André é"),
        (r"a\ b\&c\|d\h'1i'e \e\\", "a bcde \\\\"),
    ],
)
def test_escapes_become_characters(roff: str, text: str) -> None:
    assert unescape(roff) == text


def test_a_page_that_includes_another_is_a_stub() -> None:
    assert is_stub('.\\" comment\n.so man2/mmap.2\n')
    assert not is_stub(MAN)


def write_page(root: Path, name: str, body: str, also: str) -> None:
    folder = root / "usr/share/man/man2"
    folder.mkdir(parents=True, exist_ok=True)
    text = f".TH x 2\n.SH DESCRIPTION\n{body}\n.SH SEE ALSO\n{also}\n"
    (folder / f"{name}.2.gz").write_bytes(gzip.compress(text.encode()))


def test_copies_under_other_names_are_one_page_and_keep_their_links(tmp_path: Path) -> None:
    write_page(tmp_path, "accept", "Accept a call. " * 20, ".BR bind (2)")
    write_page(tmp_path, "accept4", "Accept a call. " * 20, ".BR bind (2)")
    write_page(tmp_path, "bind", "Bind a name. " * 20, ".BR accept4 (2)")
    write_page(tmp_path, "lone", "Nobody names me. " * 20, ".BR absent (2)")
    write_page(tmp_path, "short", "Too short.", "")
    (tmp_path / "usr/share/man/man2/alias.2.gz").symlink_to("bind.2.gz")
    pages = read_pages({"p": tmp_path})
    assert [[name for name, *_ in page.names] for page in pages] == [["accept", "accept4"], ["bind"], ["lone"]]
    assert links(pages) == {(0, 1)}
    assert b"bind" not in pages[0].text


def test_an_unreadable_page_is_named(tmp_path: Path) -> None:
    write_page(tmp_path, "bad", "x", "")
    (tmp_path / "usr/share/man/man2/bad.2.gz").write_bytes(b"\x1f\x8bnonsense")
    with pytest.raises(DataError, match=r"bad\.2\.gz"):
        read_pages({"p": tmp_path})
    with pytest.raises(DataError, match="no manual pages"):
        read_pages({"p": tmp_path / "elsewhere"})


def ring_of_pages(number: int) -> list[Page]:
    """Page i refers to i+1, i+7 and i+31; three sections."""
    keys = [(f"page{i}", str(1 + i % 3), "p") for i in range(number)]
    return [
        Page((key,), "", f"text {i}".encode(), "", tuple(keys[(i + step) % number] for step in (1, 7, 31)))
        for i, key in enumerate(keys)
    ]


def assert_sound(pairs: list[Pair], linked: set[tuple[int, int]], sections: list[tuple[str, ...]]) -> None:
    """What must hold for every pair list. `linked`: unordered pairs of page numbers."""
    unordered = [(min(p.left, p.right), max(p.left, p.right)) for p in pairs]
    assert len(set(unordered)) == len(unordered)
    assert all((pair in linked) == bool(p.label) for p, pair in zip(pairs, unordered, strict=True))
    for split in SPLITS:
        for side in ("left", "right"):
            seen = [
                Counter(getattr(p, side) for p in pairs if p.split == split and p.label == label) for label in (0, 1)
            ]
            assert seen[0] == seen[1]
        kinds = defaultdict(Counter)
        for p in pairs:
            if p.split == split:
                kinds[p.label][sections[p.right]] += 1
        assert kinds[0] == kinds[1]


def test_pairs_are_balanced_page_by_page_and_negatives_are_no_links() -> None:
    pages = ring_of_pages(600)
    pairs = make_pairs(pages)
    assert len(pairs) > 0.95 * 2 * 1800
    assert_sound(pairs, links(pages), [page.key[1:] for page in pages])


def test_a_held_out_pair_has_a_page_that_training_never_sees() -> None:
    pages = ring_of_pages(600)
    for pair in make_pairs(pages):
        splits = {pages[pair.left].split, pages[pair.right].split}
        assert pair.split == ("test" if "test" in splits else "val" if "val" in splits else "train")


def test_the_order_of_the_names_does_not_tell_the_label() -> None:
    _, pairs = embedded_pairs()
    for label in (0, 1):  # pages are sorted by name; 4,500 fair coins leave 0.45..0.55 with probability < 1e-10
        rising = [pair.left < pair.right for pair in pairs if pair.label == label]
        assert 0.45 < sum(rising) / len(rising) < 0.55


def test_the_pair_list_depends_on_nothing_but_the_pages() -> None:
    pages = ring_of_pages(100)
    assert make_pairs(pages) == make_pairs(pages)


def test_a_group_without_partners_gives_no_pairs() -> None:
    assert make_pairs(ring_of_pages(2)) == []


def test_committed_pairs_are_sound() -> None:
    texts, pairs = embedded_pairs()
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) == EMBEDDED_BYTES
    positives = {(min(p.left, p.right), max(p.left, p.right)) for p in pairs if p.label}
    assert_sound(pairs, positives, [page.key[1:] for page in load_embedded_pages()])
    seen = {page for pair in pairs if pair.split == "train" for page in (pair.left, pair.right)}
    assert all(not {pair.left, pair.right} <= seen for pair in pairs if pair.split != "train")
    assert Counter(pair.split for pair in pairs) == {"train": 6258, "val": 1222, "test": 1520}


def test_committed_pages_have_clear_licences_and_their_notices() -> None:
    rows = pyarrow.parquet.read_table(EMBEDDED_PAGES).to_pylist()
    told = NOTICE.read_text()
    for row in rows:
        assert licence_of(row["notice"]) == row["licence"], row["path"]
        assert f"  {row['licence']}: " in told
        assert "GPL" not in row["licence"]
    assert {name for row in rows for name in row["licence"].split(" AND ")} <= {*CLEAR, "BSD-4-Clause"}
    assert sum(path.stat().st_size for path in (EMBEDDED_PAGES, EMBEDDED_PAIRS, NOTICE)) < 4_000_000


def test_licences_are_read_from_the_header_and_unclear_ones_are_none() -> None:
    tag = '.\\" SPDX-License-Identifier: {}\n.TH x 2\n'
    assert licence_of(header_of(tag.format("BSD-3-Clause"))) == "BSD-3-Clause"
    assert licence_of(header_of(tag.format("GPL-2.0-or-later"))) is None
    assert licence_of(header_of('.\\" Copyright\n.TH x 2\n.\\" SPDX-License-Identifier: MIT\n')) is None
    bsd = (
        "Redistribution and use in source and binary forms, with or without\nmodification, are permitted ... 1. must\n"
    )
    bsd += "retain the above copyright notice"
    assert licence_of(bsd) == "BSD-2-Clause"
    assert licence_of(bsd + "All advertising materials mentioning") == "BSD-4-Clause"
    assert licence_of("All rights reserved.") is None


def test_a_page_is_left_out_when_debian_copyright_says_otherwise() -> None:
    declared = declared_licences(
        "Files: *\nLicense: GPL-2+\n\nFiles: man2/a.2\n man2/b.2\nCopyright: x\nLicense: Expat\n\nLicense: Expat\n text\n"
    )
    assert declared == {"*": "GPL-2+", "man2/a.2": "Expat", "man2/b.2": "Expat"}
    pages = [Page(((name, "2", "manpages"),), f"man2/{name}.2", b"", "", ()) for name in ("b", "c")]
    assert [is_agreed(page, "MIT", declared) for page in pages] == [True, False]


def test_a_changed_committed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "retrieval_pages.parquet"
    changed.write_bytes(EMBEDDED_PAGES.read_bytes() + b"x")
    monkeypatch.setattr(manpages, "EMBEDDED_PAGES", changed)
    with pytest.raises(DataError, match=r"retrieval_pages\.parquet: SHA-256"):
        load_embedded_pages()


def test_the_text_fallback_is_balanced_and_no_page_is_in_two_splits() -> None:
    served = text_fallback()
    assert {split: len(texts) for split, (texts, _) in served.items()} == {"train": 2170, "val": 494, "test": 490}
    body = {page.text.partition(b"\nDESCRIPTION\n")[2]: page.key for page in load_embedded_pages()}
    owner = {whole[start : start + 1000]: key for whole, key in body.items() for start in range(0, len(whole), 1000)}
    pages = {}
    for split, (texts, labels) in served.items():
        assert sum(labels) * 2 == len(labels) == len(texts)
        assert all(500 <= len(text) <= 1000 for text in texts)
        assert all(owner[text][2].startswith("freebsd") == label for text, label in zip(texts, labels, strict=True))
        pages[split] = {owner[text] for text in texts}
    assert not (pages["train"] & pages["val"] or pages["train"] & pages["test"] or pages["val"] & pages["test"])


def test_the_text_fallback_is_not_sorted_by_label() -> None:
    for _, labels in text_fallback().values():
        changes = sum(a != b for a, b in pairwise(labels))
        assert changes > len(labels) / 3  # about half of them; probability of less below 1e-12
