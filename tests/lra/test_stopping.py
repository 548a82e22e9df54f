"""A stop reaches the workers that a command starts after it has heard the signal."""

import os
import signal
import subprocess
import sys

import lra.stopping
from lra.stopping import Stop

_WORKER = """
from lra.stopping import Stopped, stop
stop.listen(None)
try:
    stop.point()
except Stopped as stopped:
    print(stopped.exit_code)
"""


def worker_says() -> str:
    return subprocess.run([sys.executable, "-c", _WORKER], capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_worker_that_starts_after_the_signal_stops_at_once(monkeypatch):
    monkeypatch.setenv(lra.stopping._STOPPED, f"{os.getpid()} 0")  # restored afterwards, whatever the handler sets
    monkeypatch.delenv(lra.stopping._STOPPED)
    monkeypatch.setattr(lra.stopping, "_children", list)
    command = Stop()
    command.forward = True
    assert worker_says() == ""
    command._hear(signal.SIGTERM, None)
    assert worker_says() == f"{128 + signal.SIGTERM}\n"


def test_a_stop_of_another_command_is_not_taken_over(monkeypatch):
    monkeypatch.setenv(lra.stopping._STOPPED, f"1 {int(signal.SIGTERM)}")
    assert worker_says() == ""
