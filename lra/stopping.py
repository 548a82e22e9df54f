"""Owns the wish to stop: a signal or a spent time budget. It is heard at once and obeyed where nothing can be lost."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

BUDGET_SPENT = 75  # sysexits.h, EX_TEMPFAIL: the same command goes on later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # they end a command with 128 + their number

_STARTED = "LRA_STARTED"  # "<process> <monotonic seconds>" of the command, for the workers that it starts itself
_STOPPED = "LRA_STOPPED"  # "<process> <signal>" of a command told to stop, for the workers that it starts still
Item = TypeVar("Item")


class Stopped(Exception):
    """The command was asked to stop. What it had done is on disk; `exit_code` is what it ends with."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason, exit_code)
        self.reason, self.exit_code = reason, exit_code

    def __str__(self) -> str:
        return self.reason


class Stop:
    """Handlers only set a flag while a run is at work: no file, no CUDA call, no lock in a handler. Elsewhere (composing,
    preparing data) there is nothing to put down, and they raise Stopped there and then."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._minutes, self._deadline = math.inf, math.inf
        self._earlier: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._deferred = False
        self.forward = False  # the work is done by child processes: hand the signal on and wait for them

    def listen(self, budget_minutes: float | None) -> None:
        """Take over the signals, once, and count the budget from the start of the command."""
        if budget_minutes is not None:
            self._minutes, self._deadline = budget_minutes, command_started() + 60 * budget_minutes
        owner, _, told = os.environ.get(_STOPPED, "").partition(" ")
        if owner == str(os.getppid()):
            self._signal = int(told)
        if threading.current_thread() is not threading.main_thread():
            return  # Python hears signals in the main thread alone
        for number in SIGNALS:
            earlier = signal.getsignal(number)
            if earlier == self._hear:
                continue
            signal.signal(number, self._hear)
            self._earlier.pop(number, None)
            if callable(earlier):  # a launcher's own, for example submitit's, which requeues the job
                self._earlier[number] = earlier

    @property
    def requested(self) -> bool:
        return self._signal is not None or time.monotonic() >= self._deadline

    @property
    def exit_code(self) -> int:
        """What the command would end with if it stopped here; 0 where nothing was asked for."""
        if self._signal is not None:
            return 128 + self._signal
        return BUDGET_SPENT if self.requested else 0

    def adopt(self, exit_code: int) -> None:
        """Take over the wish of another process of the same run."""
        if exit_code == BUDGET_SPENT:
            self._deadline = -math.inf
        elif self._signal is None:
            self._signal = exit_code - 128

    def forget(self) -> None:
        """A signal that was heard is dealt with by another process of the same run."""
        self._signal = None

    def point(self, save: Callable[[], None] = lambda: None) -> None:
        """A place where all can be put down: if a stop was asked for, `save`, then raise Stopped. A signal that a
        launcher handles is handed to the launcher after `save`; where that returns, the work goes on."""
        if not self.requested:
            return
        save()
        if self._signal is None:
            raise Stopped(f"the time budget of {self._minutes:g} minutes is spent", BUDGET_SPENT)
        if self._signal in self._earlier:
            number, self._signal = self._signal, None
            self._earlier[number](number, None)
            return
        raise Stopped(f"stopped by {signal.Signals(self._signal).name}", 128 + self._signal)

    def between(self, items: Iterable[Item], save: Callable[[], None] = lambda: None) -> Iterator[Item]:
        """`items`, with such a place before each of them."""
        for item in items:
            self.point(save)
            yield item

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block a signal waits for the next `point`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if self.forward:
            os.environ[_STOPPED] = f"{os.getpid()} {number}"  # joblib replaces workers, and deals jobs to the new ones
            for child in _children():
                os.kill(child, number)
        elif not self._deferred:
            self.point()


def command_started() -> float:
    """Monotonic seconds at the start of the command. A worker that the command started itself (joblib) counts from its
    parent's start; a job on a cluster counts from its own."""
    owner, _, seconds = os.environ.get(_STARTED, "").partition(" ")
    if owner not in (str(os.getpid()), str(os.getppid())):
        owner, seconds = str(os.getpid()), str(time.monotonic())
        os.environ[_STARTED] = f"{owner} {seconds}"
    return float(seconds)


def _children() -> list[int]:
    """Direct child processes, from Linux's /proc."""
    return [int(pid) for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]


command_started()
stop = Stop()
