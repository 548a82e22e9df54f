"""Owns the pairs of manual pages: positives out of the SEE ALSO graph, matched negatives, and their splits.

A positive pair is two pages one of which names the other in its SEE ALSO section, which is cut out of the texts. A
negative pair keeps the left page and takes the right page of another positive, of the same section and package. In each
split every page is therefore on the same side of as many negatives as positives: one page alone tells nothing.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet

from data.base import DataError, Split
from data.manpages import EMBEDDED, Page, PageKey, digest, fetch_pages, load_embedded_pages
from data.sources import require_sha256

DEBIAN_PAGES_SHA256 = "2226137d262c3e4d2d39046e3c0f650f0bcfc29117abe942073b717747c07842"
DEBIAN_PAIRS_SHA256 = "591d9e5dd535a8a6cfcc5388c7642ecb9f86ec6e517d63404053a9e2e1a1c3d4"
EMBEDDED_PAIRS = EMBEDDED / "retrieval_pairs.parquet"
EMBEDDED_PAIRS_SHA256 = "04d85f119c2f1f14871affc957e9618b4d9856aa6b04cb4235da12c021020088"


@dataclass(frozen=True)
class Pair:
    """Indices of two pages; label 1 when one refers to the other."""

    left: int
    right: int
    label: int
    split: Split


def debian_pairs(folder: Path) -> tuple[list[bytes], list[Pair]]:
    """Texts of all pages and the pairs of them, from packages fetched into `folder`. Raises DataError."""
    pages = fetch_pages(folder)
    pairs = make_pairs(pages)
    pinned = {"pages": DEBIAN_PAGES_SHA256, "pairs": DEBIAN_PAIRS_SHA256}
    found = {"pages": pages_sha256(pages), "pairs": pair_list_sha256([page.key for page in pages], pairs)}
    if found != pinned:
        raise DataError(
            f"the manual pages in {folder} give {found}, expected {pinned}: this Python reads them differently. "
            f"Use the Python of this project, or task.source=embedded."
        )
    return [page.text for page in pages], pairs


def embedded_pairs() -> tuple[list[bytes], list[Pair]]:
    """The committed pages and pairs. Raises DataError when they are not the pinned ones."""
    require_sha256(EMBEDDED_PAIRS, EMBEDDED_PAIRS_SHA256)
    rows = pyarrow.parquet.read_table(EMBEDDED_PAIRS).to_pylist()
    return [page.text for page in load_embedded_pages()], [Pair(**row) for row in rows]


def links(pages: Sequence[Page]) -> set[tuple[int, int]]:
    """Unordered pairs (i < j) of pages of which one refers to the other, under any of its names."""
    index = {key: at for at, page in enumerate(pages) for key in page.names}
    found = set()
    for at, page in enumerate(pages):
        others = {index[key] for key in page.references if key in index} - {at}
        found |= {(min(at, other), max(at, other)) for other in others}
    return found


def make_pairs(pages: Sequence[Page]) -> list[Pair]:
    """Positives and as many matched negatives, per split. A pair is test if either page is, else val if either is, else
    train: every val and test pair has a page whose text training never sees."""
    linked = links(pages)
    groups: dict[tuple[Split, str, str], list[tuple[int, int]]] = defaultdict(list)
    for i, j in linked:
        order = digest(f"{pages[i].key}{pages[j].key}")
        left, right = (i, j) if int(order, 16) % 2 else (j, i)  # else the alphabet would tell the label
        groups[_pair_split(pages[i], pages[j]), *pages[right].key[1:]].append((left, right))
    pairs = []
    used: set[tuple[int, int]] = set()
    for (split, *_), positives in sorted(groups.items()):
        matcher = _Matcher(pages, linked, used, split)
        for (left, right), other in matcher.match(positives):
            pairs += [Pair(left, right, 1, split), Pair(left, other, 0, split)]
            used.add((min(left, other), max(left, other)))
    return sorted(pairs, key=lambda pair: digest(f"{pages[pair.left].key}{pages[pair.right].key}{pair.label}"))


def pages_sha256(pages: Sequence[Page]) -> str:
    """Identity of a list of pages: the digest of each text, in order."""
    return digest("\n".join(hashlib.sha256(page.text).hexdigest() for page in pages))


def pair_list_sha256(names: Sequence[PageKey], pairs: Sequence[Pair]) -> str:
    """Identity of a pair list: split, both names and label of each pair, in order."""
    lines = ("\t".join((p.split, "/".join(names[p.left]), "/".join(names[p.right]), str(p.label))) for p in pairs)
    return digest("\n".join(lines))


class _Matcher:
    """Finds negatives for the positives of one group by permuting their right pages and repairing what is forbidden."""

    def __init__(
        self, pages: Sequence[Page], linked: set[tuple[int, int]], used: set[tuple[int, int]], split: Split
    ) -> None:
        self._pages, self._forbidden, self._split = pages, linked | used, split

    def match(self, positives: list[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
        """(positive, right page of its negative). Positives without a partner are dropped and the rest matched anew:
        the right pages of the negatives stay a permutation of those of the positives."""
        kept = sorted(positives, key=lambda pair: digest(f"{self._pages[pair[0]].key}{self._pages[pair[1]].key}left"))
        while kept:
            others, unmatched = self._permute(kept)
            if not unmatched:
                return list(zip(kept, others, strict=True))
            kept = [pair for at, pair in enumerate(kept) if at not in unmatched]
        return []

    def _permute(self, kept: list[tuple[int, int]]) -> tuple[list[int], set[int]]:
        """Right pages in a new order, and the places where no exchange gives an allowed negative."""
        others = [right for _, right in kept[1:] + kept[:1]]
        pairs = Counter(_unordered(left, other) for (left, _), other in zip(kept, others, strict=True))
        unmatched = set()
        for at in range(len(kept)):
            if self._allowed(kept[at][0], others[at]) and pairs[_unordered(kept[at][0], others[at])] == 1:
                continue
            partners = ((at + step) % len(kept) for step in range(1, len(kept)))
            if not any(self._exchange(kept, others, pairs, at, partner) for partner in partners):
                unmatched.add(at)
        return others, unmatched

    def _exchange(
        self, kept: list[tuple[int, int]], others: list[int], pairs: Counter[tuple[int, int]], i: int, j: int
    ) -> bool:
        """Exchange the right pages of negatives i and j if that makes both allowed and unique."""
        (left, _), (partner, _) = kept[i], kept[j]
        first, second = _unordered(left, others[j]), _unordered(partner, others[i])
        allowed = self._allowed(left, others[j]) and self._allowed(partner, others[i])
        if not allowed or first == second or pairs[first] or pairs[second]:
            return False
        pairs.subtract([_unordered(left, others[i]), _unordered(partner, others[j])])
        pairs.update([first, second])
        others[i], others[j] = others[j], others[i]
        return True

    def _allowed(self, left: int, right: int) -> bool:
        if left == right or _unordered(left, right) in self._forbidden:
            return False
        return _pair_split(self._pages[left], self._pages[right]) == self._split


def _unordered(i: int, j: int) -> tuple[int, int]:
    return (i, j) if i < j else (j, i)


def _pair_split(first: Page, second: Page) -> Split:
    splits = {first.split, second.split}
    return "test" if "test" in splits else "val" if "val" in splits else "train"
