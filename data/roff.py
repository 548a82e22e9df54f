"""Owns the reading of manual pages: roff source (man and mdoc macros) to plain text and the references of SEE ALSO."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from data.mdoc import is_mdoc, render_mdoc, split_tokens

SEE_ALSO = "SEE ALSO"
_REFERENCE = re.compile(r"(\w[\w.+:-]*)\((\d)[a-z]{0,8}\)")  # mmap(2), err(3const)

_ESCAPE = re.compile(
    r"""\\(?:
    \((?P<two>..) | \[(?P<long>[^\]]*)\] | \*(?:\((?P<string>..)|\[(?P<string_long>[^\]]*)\]|.)
    | f(?:\(..|\[[^\]]*\]|.) | s(?:[+-]?\d{1,2}|\[[^\]]*\]|'[^']*') | [hvwlLoNbDSRHXZCA]'[^']*'
    | n(?:\(..|.) | k. | ["#].*
    | (?P<one>.) )""",
    re.VERBOSE,
)
_ONE = {each: each for each in "-\\ '`.\t"} | {"e": "\\", "0": " ", "~": " ", "t": "\t"}
_NAMED = {
    "em": "--", "en": "-", "hy": "-", "mi": "-", "pl": "+", "mu": "x", "di": "/", "eq": "=", "+-": "+-", "**": "*",
    "aq": "'", "cq": "'", "oq": "`", "ga": "`", "aa": "'", "dq": '"', "lq": '"', "rq": '"', "Lq": '"', "Rq": '"',
    "bu": "*", "co": "(C)", "rg": "(R)", "tm": "(TM)", "de": " degrees", "ha": "^", "ti": "~", "rs": "\\", "ba": "|",
    "or": "|", "br": "|", "sl": "/", "at": "@", "sh": "#", "Do": "$", "lB": "[", "rB": "]", "lC": "{", "rC": "}",
    "la": "<", "ra": ">", "<=": "<=", ">=": ">=", "!=": "!=", "->": "->", "<-": "<-", "==": "==", "ul": "_",
    "Lt": "<", "Gt": ">", "Le": "<=", "Ge": ">=", "Ne": "!=", "Ba": "|", "Am": "&", "Tm": "(TM)", "Pm": "+-",
    "12": "1/2", "14": "1/4", "34": "3/4", "ss": "ß", "ae": "æ", "AE": "Æ", "/o": "ø", "/O": "Ø", "oa": "å", "oA": "Å",
    "mc": "µ", "*m": "µ", "if": "infinity", "sr": "sqrt", "ua": "^", "fm": "'", "sd": '"', "bv": "|", "S2": "^2",
}  # fmt: skip
_ACCENT = {"'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", "~": "\u0303", ",": "\u0327", "v": "\u030c"}

_PLAIN = {"B", "I", "R", "SM", "SB"}
_ALTERNATING = {"BR", "RB", "BI", "IB", "IR", "RI"}
_BREAK = {"PP", "P", "LP", "HP", "TP", "TQ", "br", "sp", "RS", "RE", "SY", "YS", "bp", "Pp", "Lp"}
_LITERAL, _FILLED = {"nf", "EX"}, {"fi", "EE"}
_SKIPPED = {"de": "..", "de1": "..", "am": "..", "ig": "..", "EQ": ".EN"}


@dataclass(frozen=True)
class RoffPage:
    """text: every section but SEE ALSO, "mmap(2)" written as "mmap"; references: (name, section digit) in SEE ALSO."""

    text: str
    references: tuple[tuple[str, str], ...]


def read_roff(source: str) -> RoffPage:
    """Plain text and references of one page. Layout is lost on purpose: paragraphs are lines, spaces are single."""
    lines = _logical_lines(source)
    reader = _MdocReader() if is_mdoc(lines) else _Reader()
    reader.read(lines)
    text = _REFERENCE.sub(r"\1", "\n".join(reader.finish(see_also=False)))
    found = _REFERENCE.findall("\n".join(reader.finish(see_also=True)))
    return RoffPage(text, tuple(dict.fromkeys(found)))


def is_stub(source: str) -> bool:
    """True for a page that only includes another one (.so man2/mmap.2)."""
    lines = (line for line in source.splitlines() if line.strip() and not line.startswith(('.\\"', "'\\\"")))
    return next(lines, "").startswith(".so ")


def split_arguments(rest: str) -> list[str]:
    """Arguments of a macro line."""
    return [argument for argument, _ in split_tokens(rest)]


def unescape(text: str) -> str:
    """Replace roff escapes: fonts and motions vanish, named characters become themselves."""
    return unicodedata.normalize("NFC", _ESCAPE.sub(_character, text)) if "\\" in text else text


def _character(match: re.Match[str]) -> str:
    if (one := match["one"]) is not None:
        return _ONE.get(one, "")
    name = match["two"] or match["long"] or match["string"] or match["string_long"] or ""
    if name in _NAMED:
        return _NAMED[name]
    if re.fullmatch(r"u[0-9A-F]{4,5}", name):
        return chr(int(name[1:], 16))
    if len(name) == 2 and name[0] in _ACCENT and name[1].isalpha():
        return name[1] + _ACCENT[name[0]]
    return ""


def _logical_lines(source: str) -> list[str]:
    """Source lines without comments, definitions and equations; a backslash at a line's end joins it to the next."""
    joined = re.sub(r"(?<!\\)\\\n", "", source.replace("\r\n", "\n"))
    kept, until = [], None
    for line in joined.split("\n"):
        if until is not None:
            until = None if line.startswith(until) else until
        elif (macro := re.match(r"[.']\s*(\w+)", line)) and macro[1] in _SKIPPED:
            until = _SKIPPED[macro[1]]
        elif not re.match(r"[.']\s*\\\"", line):
            kept.append(re.sub(r'(?<!\\)\\".*', "", line))
    return kept


class _Reader:
    """State of one pass over a man(7) page: the paragraph in the making and whether we are inside SEE ALSO."""

    def __init__(self) -> None:
        self._done: dict[bool, list[str]] = {False: [], True: []}
        self._paragraph: list[str] = []
        self._see_also = self._literal = self._heading_follows = False
        self._table: str | None = None  # None outside; "format" before its full stop; then the column separator
        self._separator = "\t"

    def read(self, lines: Sequence[str]) -> None:
        for line in lines:
            if self._table is not None:
                self._table_line(line)
            elif line[:1] in (".", "'") and len(line) > 1:
                name, _, rest = line[1:].lstrip().partition(" ")
                self._macro(name.rstrip(), rest.strip())
            elif self._heading_follows:
                self._heading(line)
            elif not line.strip():
                self._break()
            else:
                self._add(unescape(line))
        self._break()

    def finish(self, see_also: bool) -> list[str]:
        return self._done[see_also]

    def _macro(self, name: str, rest: str) -> None:
        if name in ("SH", "SS"):
            self._heading_follows = not rest
            if rest:
                self._heading(" ".join(split_arguments(rest)), section=name == "SH")
        elif name in _PLAIN:
            self._add(unescape(" ".join(split_arguments(rest))))
        elif name in _ALTERNATING:
            self._add(unescape("".join(split_arguments(rest))))
        elif name in _BREAK:
            self._break()
        elif name in _LITERAL or name in _FILLED:
            self._break()
            self._literal = name in _LITERAL
        elif name == "IP":
            self._break()
            self._add(unescape("".join(split_arguments(rest)[:1])))
        elif name in ("UR", "MT"):
            self._add(unescape(rest))
        elif name == "TS":
            self._break()
            self._table, self._separator = "format", "\t"

    def _heading(self, title: str, section: bool = True) -> None:
        self._break()
        self._heading_follows = False
        title = unescape(title).strip()
        if section:
            self._see_also, self._literal = title.upper() == SEE_ALSO, False
        if not self._see_also:
            self._done[False].append(title)

    def _table_line(self, line: str) -> None:
        """One line of tbl(1): options, format, then rows of cells."""
        if line.startswith(".TE"):
            self._table = None
        elif self._table == "format":
            if chosen := re.search(r"tab\s*\((.)\)", line):
                self._separator = chosen[1]
            if line.rstrip().endswith("."):
                self._table = "rows"
        elif line.startswith((".", "'")):
            self._macro(*(part.strip() for part in line[1:].partition(" ")[::2]))
        elif line.strip() not in ("_", "="):
            cells = line.replace("T{", " ").replace("T}", " ").split(self._separator)
            self._add(unescape(" ".join(cells)))
            self._break()

    def _add(self, text: str) -> None:
        self._paragraph.append(text)
        if self._literal:
            self._break()

    def _break(self) -> None:
        line = " ".join(" ".join(self._paragraph).split())
        self._paragraph = []
        if line:
            self._done[self._see_also].append(line)


class _MdocReader(_Reader):
    """The same for mdoc(7) pages, whose lines are rendered by data.mdoc."""

    def __init__(self) -> None:
        super().__init__()
        self._name = ""
        self._arguments: list[str] | None = None  # of a function between .Fo and .Fc

    def _macro(self, name: str, rest: str) -> None:
        if name in ("Sh", "Ss"):
            self._heading(render_mdoc("No", rest, self._name), section=name == "Sh")
        elif name in ("Bd", "Ed"):
            self._break()
            self._literal = name == "Bd" and ("-literal" in rest or "-unfilled" in rest)
        elif name in ("Fo", "Fc") or (name == "Fa" and self._arguments is not None):
            self._function(name, rest)
        elif name in ("TS", "nf", "fi") or name in _BREAK:
            super()._macro(name, rest)
        else:
            if name in ("It", "Bl", "El", "D1", "Dl", "Fd", "In", "Ft", "Cd"):
                self._break()
            if name == "Nm" and not self._name:
                self._name = unescape("".join(split_arguments(rest)[:1]))
            self._add(unescape(render_mdoc(name, rest, self._name)))

    def _function(self, name: str, rest: str) -> None:
        if name == "Fo":
            self._paragraph.append(unescape("".join(split_arguments(rest)[:1])))
            self._arguments = []
        elif name == "Fa" and self._arguments is not None:
            self._arguments.extend(unescape(argument) for argument in split_arguments(rest))
        elif name == "Fc":
            closed = f"({', '.join(self._arguments or ())}){''.join(split_arguments(rest))}"
            opened = self._paragraph.pop() if self._paragraph else ""
            self._arguments = None
            self._add(opened + closed)
