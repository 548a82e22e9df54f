"""Owns reading the released ListOps files, `basic_{train,val,test}.tsv`: every row is parsed, evaluated and checked.

A row is `Source <tab> Target` (printed form: data/listops_text.py). An operator with n arguments opens n + 1
parentheses just before its own token, so one pass from left to right knows at every token what has to come next.
"""

import logging
import time
from pathlib import Path

import numpy as np
from numba import njit

from data.base import DataError
from data.listops_pool import Pool
from data.listops_text import CLOSE, FIRST_DIGIT, MAX, MED, MIN, SM

_HEADER = b"Source\tTarget"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ADVICE = "unpack the release archive again (lra_release.gz of google-research/long-range-arena), or use a whole copy"
_ROWS_PER_CALL = 2000
_SECONDS_BETWEEN_REPORTS = 5.0
_MOST_OPEN = 1000  # operators open at once; the released files have nine

# Why a call of _read_rows returned: the first two are no fault of a row.
_DONE, _NO_MORE_ROWS, _BLANK, _COLUMNS, _TOKEN, _ORDER, _DEPTH, _UNFINISHED, _TARGET, _LABEL = range(10)
# What an expression waits for.
_ARGUMENT, _HEAD, _PAIR_END, _BRACKET, _OPERATOR_END, _NOTHING = range(6)
_WAITS_FOR = (
    "a digit or '('",
    "'(' or, after two of them, an operator",
    "')' after an argument",
    "']' because the parentheses announced no further argument",
    "')' after ']'",
    "the end of the expression",
)
_LEFT, _RIGHT, _UNKNOWN = 16, 17, 18  # beside the token ids
_OPERATOR, _ANNOUNCED, _SEEN, _COUNTS = 0, 1, 2, 3  # columns of an open operator; then how often each digit was seen
_SPACE, _TAB, _LINE_FEED, _CARRIAGE_RETURN, _ZERO = b" \t\n\r0"
# Symbols as integers: the byte 1, which marks the length, and their own bytes
_WORD_MIN, _WORD_MAX, _WORD_MED, _WORD_SM, _WORD_LEFT, _WORD_RIGHT, _WORD_CLOSE, _WORD_ZERO = (
    int.from_bytes(b"\1" + word) for word in (b"[MIN", b"[MAX", b"[MED", b"[SM", b"(", b")", b"]", b"0")
)

_logger = logging.getLogger(__name__)


def read(file: Path, num_rows: int) -> Pool:
    """The first `num_rows` rows. DataError names file, line (from 1) and reason. Rows beyond them are not read."""
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty: {_ADVICE}")
    buffer = np.memmap(file, dtype=np.uint8, mode="r")
    start = _after_header(buffer, file)
    tokens = np.empty(len(buffer), dtype=np.uint8)  # reserved, not touched: most pages never become memory
    offsets, labels = np.zeros(num_rows + 1, dtype=np.int64), np.zeros(num_rows, dtype=np.uint8)
    open_operators = np.zeros((_MOST_OPEN, _COUNTS + 10), dtype=np.int64)
    row = 0
    next_report = time.monotonic() + _SECONDS_BETWEEN_REPORTS
    while row < num_rows:
        stop = min(row + _ROWS_PER_CALL, num_rows)
        reason, row, start, at, hint = _read_rows(buffer, start, row, stop, tokens, offsets, labels, open_operators)
        if reason == _NO_MORE_ROWS:
            raise DataError(f"{file} holds {row} rows where {num_rows} are asked for: {_ADVICE}, or ask for fewer")
        if reason != _DONE:
            raise DataError(_complaint(buffer, file, row, start, reason, at, hint))
        if time.monotonic() > next_report:
            _logger.info("listops: %d of %d rows of %s read", row, num_rows, file)
            next_report += _SECONDS_BETWEEN_REPORTS
    return Pool(tokens[: offsets[-1]].copy(), offsets, labels)


def _after_header(buffer: np.ndarray, file: Path) -> int:
    """Where the first row begins."""
    mark = len(_BYTE_ORDER_MARK) if bytes(buffer[: len(_BYTE_ORDER_MARK)]) == _BYTE_ORDER_MARK else 0
    end, _, _ = _find_line(buffer, mark)
    header = bytes(buffer[mark:end])
    if header != _HEADER:
        shown = header[:80].decode("utf-8", "replace")
        raise DataError(f"{file}, line 1: the header is {shown!r} where {_HEADER.decode()!r} is expected")
    return _next_line(buffer, end)


def _complaint(buffer: np.ndarray, file: Path, row: int, start: int, reason: int, at: int, hint: int) -> str:
    """The message for the row that begins at byte `start`; `at` and `hint` as `_read_rows` returned them."""
    end, _, _ = _find_line(buffer, start)
    shown = bytes(buffer[at : min(end, at + 40)]).decode("utf-8", "replace")
    symbol = shown.replace("\t", " ").split(" ")[0]
    # `hint` is a place in _WAITS_FOR for two of the reasons, and a count or a value for others
    waits_for = _WAITS_FOR[hint] if 0 <= hint < len(_WAITS_FOR) else ""
    text = {
        _BLANK: "an empty line between rows",
        _COLUMNS: f"{hint} columns where 2 are expected, Source<tab>Target",
        _TOKEN: f"{symbol!r} is not a ListOps token; expected ( ) ] 0..9 [MIN [MAX [MED [SM, split by single spaces",
        _ORDER: f"unbalanced expression, {symbol!r} where the expression needs {waits_for}",
        _DEPTH: f"{_MOST_OPEN} operators open at once",
        _UNFINISHED: f"unbalanced expression, Source ends where the expression needs {waits_for}",
        _TARGET: f"the target {shown!r} is not one of 0..9",
        _LABEL: f"the target contradicts the expression, whose value is {hint}",
    }[reason]
    cut = f"; the file ends within this line: {_ADVICE}" if end == len(buffer) else ""
    return f"{file}, line {row + 2}, character {at - start + 1}: {text}{cut}"


@njit(nogil=True)
def _read_rows(buffer, start, row, stop, tokens, offsets, labels, open_operators):
    """Read rows `row`..`stop`-1 from byte `start` on. -> reason, first row not read, its first byte, the byte that the
    reason is about, and a hint: columns found, what the expression waits for, or its value."""
    while row < stop:
        end, tab, tabs = _find_line(buffer, start)
        if end == start:
            while end < len(buffer) and (buffer[end] == _LINE_FEED or buffer[end] == _CARRIAGE_RETURN):
                end += 1
            return (_NO_MORE_ROWS if end == len(buffer) else _BLANK), row, start, start, 0
        if tabs != 1:
            return _COLUMNS, row, start, start, tabs + 1
        first = offsets[row]
        reason, at, hint, used = _read_source(buffer, start, tab, tokens, first, open_operators)
        if reason != _DONE:
            return reason, row, start, at, hint
        target = np.int64(buffer[tab + 1]) - _ZERO if end == tab + 2 else -1
        if target < 0 or target > 9:
            return _TARGET, row, start, tab + 1, 0
        if target != hint:
            return _LABEL, row, start, tab + 1, hint
        offsets[row + 1] = used
        labels[row] = target
        row += 1
        start = _next_line(buffer, end)
    return _DONE, row, start, start, 0


@njit(nogil=True)
def _read_source(buffer, at, end, tokens, used, frames):
    """Parse the expression in buffer[at:end], write its ids from tokens[used] on -> reason, byte, hint, used. The hint
    is the expression's value when the reason is _DONE."""
    depth = announced = value = 0
    state = _ARGUMENT
    while at < end:
        symbol, after = _read_symbol(buffer, at, end)
        if symbol == _UNKNOWN:
            return _TOKEN, at, 0, used
        reached = _next_state(state, symbol, announced)
        if reached < 0 or depth == len(frames):
            return (_ORDER if reached < 0 else _DEPTH), at, state, used
        if reached == _HEAD:  # a parenthesis
            announced += 1
        elif state == _HEAD:  # an operator
            _open(frames[depth], symbol, announced - 1)
            depth += 1
            announced = 0
        elif state == _PAIR_END and frames[depth - 1, _SEEN] == frames[depth - 1, _ANNOUNCED]:
            reached = _BRACKET
        elif state == _OPERATOR_END:
            depth -= 1
            value = _value(frames[depth])
        elif state == _ARGUMENT:
            value = symbol - FIRST_DIGIT
        if reached == _PAIR_END:  # the value is an argument, unless it is the whole
            if depth == 0:
                reached = _NOTHING
            else:
                frames[depth - 1, _SEEN] += 1
                frames[depth - 1, _COUNTS + value] += 1
        if symbol <= CLOSE:
            tokens[used] = symbol
            used += 1
        state = reached
        at = after
    return (_DONE, at, value, used) if state == _NOTHING else (_UNFINISHED, at, state, used)


@njit(nogil=True)
def _next_state(state, symbol, announced):
    """What is waited for after `symbol`, or -1 when `symbol` may not come in this state."""
    if symbol == _LEFT:
        return _HEAD if state in (_ARGUMENT, _HEAD) else -1
    if symbol < MIN:
        return _PAIR_END if state == _ARGUMENT else -1
    if symbol < CLOSE:
        return _ARGUMENT if state == _HEAD and announced >= 2 else -1
    if symbol == CLOSE:
        return _OPERATOR_END if state == _BRACKET else -1
    if state == _OPERATOR_END:
        return _PAIR_END
    return _ARGUMENT if state == _PAIR_END else -1


@njit(nogil=True)
def _open(frame, symbol, announced):
    frame[:] = 0
    frame[_OPERATOR] = symbol
    frame[_ANNOUNCED] = announced


@njit(nogil=True)
def _read_symbol(buffer, at, end):
    """The symbol at byte `at` and the first byte of the next one; symbols are split by one space."""
    stop, word = at, 1
    while stop < end and buffer[stop] != _SPACE:
        word = (word << 8 | np.int64(buffer[stop])) if stop < at + 4 else 0
        stop += 1
    symbol = _UNKNOWN
    if word == _WORD_LEFT:
        symbol = _LEFT
    elif word == _WORD_RIGHT:
        symbol = _RIGHT
    elif _WORD_ZERO <= word <= _WORD_ZERO + 9:
        symbol = FIRST_DIGIT + word - _WORD_ZERO
    elif word == _WORD_CLOSE:
        symbol = CLOSE
    elif word == _WORD_MIN:
        symbol = MIN
    elif word == _WORD_MAX:
        symbol = MAX
    elif word == _WORD_MED:
        symbol = MED
    elif word == _WORD_SM:
        symbol = SM
    return symbol, min(stop + 1, end)


@njit(nogil=True)
def _value(frame):
    """The value of an operator, from how often each digit is among its arguments."""
    total = 0
    lowest, highest, lower_middle, upper_middle = -1, -1, -1, -1
    seen = 0
    for digit in range(10):
        count = frame[_COUNTS + digit]
        seen += count
        total += digit * count
        if count > 0:
            highest = digit
            lowest = digit if lowest < 0 else lowest
        if lower_middle < 0 and 2 * seen >= frame[_SEEN]:
            lower_middle = digit
        if upper_middle < 0 and 2 * seen > frame[_SEEN]:
            upper_middle = digit
    if frame[_OPERATOR] == MIN:
        return lowest
    if frame[_OPERATOR] == MAX:
        return highest
    return (lower_middle + upper_middle) // 2 if frame[_OPERATOR] == MED else total % 10


@njit(nogil=True)
def _find_line(buffer, start):
    """The line that begins at byte `start` -> the byte after it, its first tab, its number of tabs."""
    end, tab, tabs = start, -1, 0
    while end < len(buffer) and buffer[end] != _LINE_FEED and buffer[end] != _CARRIAGE_RETURN:
        if buffer[end] == _TAB:
            tab = end if tabs == 0 else tab
            tabs += 1
        end += 1
    return end, tab, tabs


@njit(nogil=True)
def _next_line(buffer, end):
    """The first byte after the line end at byte `end`: LF, CR, or both."""
    if end + 1 < len(buffer) and buffer[end] == _CARRIAGE_RETURN and buffer[end + 1] == _LINE_FEED:
        return end + 2
    return min(end + 1, len(buffer))
