"""Owns the text of one mdoc(7) macro line: nested macros, brackets, and punctuation that sticks to its word."""

import re
from collections.abc import Sequence

_GLUE = "\x00"  # no blank here
_CLOSING = {".", ",", ":", ";", ")", "]", "?", "!"}
_OPENING = {"(", "["}
_ENCLOSED = {
    "Op": "[]", "Bq": "[]", "Pq": "()", "Aq": "<>", "Brq": "{}", "Dq": '""', "Qq": '""', "Sq": "''", "Ql": "''",
}  # fmt: skip
_OPENED = {"Oo": "[", "Bo": "[", "Po": "(", "Ao": "<", "Bro": "{", "Do": '"', "Qo": '"', "So": "'", "Eo": "", "Xo": ""}
_CLOSED = {"Oc": "]", "Bc": "]", "Pc": ")", "Ac": ">", "Brc": "}", "Dc": '"', "Qc": '"', "Sc": "'", "Ec": "", "Xc": ""}
_SYSTEM = {
    "Fx": "FreeBSD", "Nx": "NetBSD", "Ox": "OpenBSD", "Dx": "DragonFly", "Bsx": "BSD/OS", "Ux": "UNIX", "Bx": "BSD",
    "At": "AT&T UNIX",
}  # fmt: skip
_LEADING = {"Cd", "Fd", "In", "It", "Lb", "Nd", "D1", "Dl"}  # macros only where they open the line
_WORDS = {
    "Ad", "An", "Ar", "Cm", "Dv", "Em", "Er", "Ev", "Fa", "Ft", "Ic", "Li", "Lk", "Ms", "Mt", "No", "Pa", "St", "Sx",
    "Sy", "Tn", "Va", "Vt", "%A", "%B", "%C", "%D", "%I", "%J", "%N", "%O", "%P", "%Q", "%R", "%T", "%U", "%V",
}  # fmt: skip
_CALLABLE = {*_ENCLOSED, *_OPENED, *_CLOSED, *_SYSTEM, *_WORDS, "Fl", "Fn", "Nm", "Xr", "Ns", "Ap", "Pf"}


def is_mdoc(lines: Sequence[str]) -> bool:
    """An mdoc page has a .Dd or .Dt line where a man page has .TH."""
    return any(re.match(r"\.\s*D[dt]\b", line) for line in lines)


def render_mdoc(macro: str, rest: str, name: str) -> str:
    """Text of `.macro rest`; `name` is what a bare .Nm stands for. Macros without text of their own give ""."""
    if macro not in _CALLABLE | _LEADING:
        return ""
    tokens = split_tokens(rest)
    text = " ".join(word for word in _render([(macro, True), *tokens], name) if word)
    return re.sub(f" *{_GLUE} *", "", text)


def split_tokens(rest: str) -> list[tuple[str, bool]]:
    """(argument, was it unquoted) of a macro line: blanks separate, double quotes group, "" within them is a quote."""
    found = re.findall(r'"((?:[^"]|"")*)(?:"|$)|((?:\\.|[^\s\\]|\\$)+)', rest)
    return [(plain, True) if plain else (quoted.replace('""', '"'), False) for quoted, plain in found]


def _render(tokens: list[tuple[str, bool]], name: str) -> list[str]:
    """Words of a line whose tokens are (text, may be a macro)."""
    words: list[str] = []
    at, first = 0, True
    while at < len(tokens):
        token, plain = tokens[at]
        at += 1
        if not (plain and (first or token in _CALLABLE)):
            words.append(_word(token, plain))
            continue
        first = False
        if token in _ENCLOSED:
            left, right = _ENCLOSED[token]
            inside, tail = _trailing_punctuation(tokens[at:])
            words += [left + _GLUE, *_render([("No", True), *inside], name), _GLUE + right, *tail]
            break
        end = at
        while end < len(tokens) and not (tokens[end][1] and tokens[end][0] in _CALLABLE):
            end += 1
        inside, tail = _trailing_punctuation(tokens[at:end])
        words += [*_simple(token, [text for text, _ in inside], inside, name), *tail]
        at = end
    return words


def _simple(macro: str, arguments: list[str], tokens: list[tuple[str, bool]], name: str) -> list[str]:
    """Words of a macro whose arguments hold no further macro."""
    if macro == "Xr":
        return [f"{arguments[0]}({arguments[1]})", *arguments[2:]] if len(arguments) > 1 else arguments
    if macro == "Fn":
        return [f"{arguments[0]}({', '.join(arguments[1:])})"] if arguments else []
    if macro == "Fl":
        return [f"-{argument}" for argument in arguments] or ["-"]
    if macro == "In":
        return [f"#include <{''.join(arguments)}>"]
    if macro == "Nm":
        return [_word(*token) for token in tokens] or [name]
    if macro == "Ar" and not arguments:
        return ["file ..."]
    if macro == "Nd":
        return ["-", *arguments]
    if macro in ("Ns", "Ap", "Pf"):
        before, after = {"Ns": (_GLUE, ""), "Ap": (f"{_GLUE}'{_GLUE}", ""), "Pf": ("", _GLUE)}[macro]
        return [before, *arguments, after]
    if macro in _SYSTEM:
        return [" ".join([*arguments, _SYSTEM[macro]] if macro in ("Bx", "At") else [_SYSTEM[macro], *arguments])]
    if macro in _OPENED:
        return [_OPENED[macro] + _GLUE, *arguments]
    if macro in _CLOSED:
        return [_GLUE + _CLOSED[macro], *arguments]
    return [_word(*token) for token in tokens]


def _word(token: str, plain: bool) -> str:
    if plain and token in _CLOSING:
        return _GLUE + token
    return token + _GLUE if plain and token in _OPENING else token


def _trailing_punctuation(tokens: list[tuple[str, bool]]) -> tuple[list[tuple[str, bool]], list[str]]:
    end = len(tokens)
    while end and tokens[end - 1][1] and tokens[end - 1][0] in _CLOSING:
        end -= 1
    return tokens[:end], [_GLUE + token for token, _ in tokens[end:]]
