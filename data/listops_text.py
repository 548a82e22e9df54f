"""Owns ListOps as text: the table of token ids, the printed form, and the slow definition of tokenising and evaluating.

An operator with arguments a1..an is stored as left-nested pairs and printed with single spaces (arXiv:1804.06028):
`( ( ( [MAX a1 ) a2 ) ] )`, so it opens n + 1 parentheses. The generator and the reader of the released files each do
their own arithmetic; this file is what both are tested against.
"""

from collections.abc import Iterable

from data.base import DataError

PADDING = 0
FIRST_DIGIT = 1  # the digit d has id FIRST_DIGIT + d
MIN, MAX, MED, SM = 11, 12, 13, 14
CLOSE = 15
OPERATORS = {"[MIN": MIN, "[MAX": MAX, "[MED": MED, "[SM": SM}
BRACKETS = {
    "x": "the closing bracket is the token X: the task as intended, and Google's code since March 2021",
    "none": "no closing bracket, the nesting is lost: Google's leaderboard of November 2020 and the Skyformer family",
}
NUM_IDS = {"x": CLOSE + 1, "none": CLOSE}  # ids in use, padding included

_IDS = {**{str(digit): FIRST_DIGIT + digit for digit in range(10)}, **OPERATORS, "]": CLOSE}
SYMBOLS = {number: symbol for symbol, number in _IDS.items()}


def tokenise(source: str, brackets: str) -> list[int]:
    """Token ids of a printed expression: parentheses vanish, `]` becomes X (brackets "x") or vanishes ("none")."""
    ids = []
    for symbol in source.split():
        if symbol in ("(", ")"):
            continue
        if symbol not in _IDS:
            raise DataError(f"{symbol!r} is not a ListOps token; expected ( ) ] 0..9 or one of {' '.join(OPERATORS)}")
        if symbol != "]" or brackets == "x":
            ids.append(_IDS[symbol])
    return ids


def to_source(ids: Iterable[int]) -> str:
    """The printed form, parentheses included, of one complete expression in ids with X. Inverse of `tokenise`."""
    open_operators: list[str] = []  # each is the printed pair chain so far
    for number in ids:
        symbol = SYMBOLS[int(number)]
        if symbol in OPERATORS:
            open_operators.append(symbol)
            continue
        printed = f"( {open_operators.pop()} ] )" if symbol == "]" else symbol
        if not open_operators:
            return printed
        open_operators[-1] = f"( {open_operators[-1]} {printed} )"
    raise DataError(f"the expression ends with {len(open_operators)} operators still open")


def evaluate(source: str) -> int:
    """Value of a printed expression: its pairs are folded from the inside out. DataError when it is malformed."""
    stack: list[object] = []  # "(", "[OP", "]", a value, or a pair chain ("[OP", arguments)
    for symbol in source.split():
        if symbol != ")":
            stack.append(int(symbol) if symbol.isdecimal() else symbol)
            continue
        if len(stack) < 3 or stack[-3] != "(":
            raise DataError(f"unbalanced expression: {source[:80]!r}")
        _, left, right = stack[-3:]
        stack[-3:] = [_join(left, right)]
    if len(stack) != 1 or not isinstance(stack[0], int):
        raise DataError(f"unbalanced expression: {source[:80]!r}")
    return stack[0]


def _join(left: object, right: object) -> object:
    """The pair (left, right): an operator takes its next argument, or its closing bracket and becomes a value."""
    operator, arguments = left if isinstance(left, tuple) else (left, ())
    if operator not in OPERATORS or not (isinstance(right, int) or (right == "]" and arguments)):
        raise DataError(f"not a ListOps pair: ( {left} {right} )")
    if right != "]":
        return operator, (*arguments, right)
    ordered = sorted(arguments)
    middle = len(ordered) // 2
    if operator == "[MIN":
        return ordered[0]
    if operator == "[MAX":
        return ordered[-1]
    if operator == "[MED":  # of an even count: the mean of the two middle values, its half truncated
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    return sum(ordered) % 10
