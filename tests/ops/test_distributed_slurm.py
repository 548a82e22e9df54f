"""The real thing: one run over two tasks of a SLURM job, warned and requeued on the way."""

import subprocess

from tests.ops import slurm
from tests.ops.survival import SMALL
from tests.ops.test_slurm import SLURM, command, pytestmark, records, wait_for  # noqa: F401 (skips as that test does)

RANKS = (
    "-m", *SMALL, *SLURM, "devices=2", "hydra.launcher.tasks_per_node=2", "seed=0", "per_task.listops.num_steps=1500",
    "per_task.listops.eval_every=750", "protocol.checkpoint_every=100",
    'hydra.launcher.setup=["export SLURM_KILL_BAD_EXIT=1"]',
)  # fmt: skip


def test_a_run_over_two_tasks_that_is_warned_goes_on_from_its_checkpoint(tmp_path):
    runs = tmp_path / "cluster"
    with slurm.one_node() as cluster:

        def ask(*arguments: str) -> str:
            done = subprocess.run(arguments, env=cluster, capture_output=True, text=True, timeout=60, check=True)
            return done.stdout

        def has_started_again() -> bool:
            held = [
                line.split()[0] for line in ask("squeue", "-h", "-r", "-o", "%i %r").splitlines() if "BeginTime" in line
            ]
            for job in held:  # SLURM holds a requeued job back for two minutes
                ask("scontrol", "update", f"jobid={job}", "starttime=now")
            return bool(held)

        settings = command(tmp_path, "cluster", base=cluster)
        settings["args"] = [*settings["args"][:2], *RANKS]
        with subprocess.Popen(**settings) as driver:
            try:
                wait_for(lambda: list(runs.glob("checkpoints/*.pt")) or driver.poll() is not None, "a checkpoint")
                assert driver.poll() is None, driver.communicate()
                (job,) = ask("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%i").split()
                ask("scancel", "--signal=USR2", job)  # what SLURM sends before a time limit or a preemption
                wait_for(lambda: has_started_again() or driver.poll() is not None, "the job to be requeued")
                said = driver.communicate(timeout=300)[1]
            finally:
                driver.kill()
        jobs = ask("sacct", "-X", "-n", "-D", "-o", "JobID%20,State%20")
        logs = "\n".join(path.read_text() for path in runs.rglob("*_log.out"))
    print(jobs, said, logs, sep="\n")
    assert driver.returncode == 0 and "REQUEUED" in jobs, (said, jobs)
    (record,) = records(runs).values()
    assert record["status"] == "finished" and record["provenance"]["resumed_at_step"] > 0
    assert record["provenance"]["ranks"]["world_size"] == 2
