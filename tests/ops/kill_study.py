"""Owns the long form of tests/ops/test_survival.py: kill one run at many random moments and compare what it ends with.

python -m tests.ops.kill_study [moments=50] [seed=0]
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.ops import survival
from tests.ops.occasion import occasion
from tests.ops.survival import configured, only_record, reproducible


def kill_and_finish(folder: Path, moment: float) -> str:
    """Where the run was when it was killed, by what it had left on disk; afterwards it is run to its end."""
    config = configured(folder / "runs", folder / "datasets")
    child = survival.start(config, survival.undisturbed, folder / "said")
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    survival.finish(child)
    where = "data preparation"
    if list((folder / "datasets").rglob("manifest.json")):
        where = "before the first checkpoint"
    if list((folder / "runs").glob("checkpoints/*.pt")):
        where = "training, test or measurement"
    if list((folder / "runs").glob("ledger/*.json")):
        where = "after the record"
    if list((folder / "runs").rglob(".*.pt.*")) or list((folder / "runs").rglob(".*.json.*")):
        where = "a write"
    code = survival.run(config, folder / "said")
    assert code == 0, (folder / "said").read_text()
    return where


def main(moments: int, seed: int) -> None:
    print(occasion())
    folder = Path(tempfile.mkdtemp(prefix="kill_study_"))
    survival.train(configured(folder / "whole" / "runs", folder / "whole" / "datasets"))
    expected = reproducible(only_record(folder / "whole" / "runs"))
    (folder / "timed").mkdir()
    config = configured(folder / "timed" / "runs", folder / "timed" / "datasets")
    started = time.monotonic()
    child = survival.start(config, survival.undisturbed, folder / "said")
    while not list((folder / "timed" / "runs").glob("ledger/*.json")):
        time.sleep(0.001)
    seconds = time.monotonic() - started  # to the record: a process takes longer to end
    survival.finish(child)
    draw, found, different = random.Random(seed), dict[str, int](), 0
    for number in range(moments):
        place = folder / str(number)
        place.mkdir()
        where = kill_and_finish(place, draw.uniform(0, 1.1 * seconds))
        found[where] = found.get(where, 0) + 1
        different += reproducible(only_record(place / "runs")) != expected
        shutil.rmtree(place)
    shutil.rmtree(folder)
    print(
        f"{moments} kills, uniform over {seconds:.2f} s to the record and a tenth more; {different} records differ from the undisturbed one"
    )
    print("\n".join(f"  {count:>3}  killed in: {where}" for where, count in sorted(found.items())))
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main(*(int(value) for value in (*sys.argv[1:], *("50", "0")[len(sys.argv) - 1 :])))
