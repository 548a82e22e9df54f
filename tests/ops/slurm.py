"""Owns a real SLURM of one node, with accounting, in a temporary folder: no systemd, no shared file, its own ports.

apt-get install -y --no-install-recommends slurm-wlm munge slurmdbd mariadb-server      # Debian 12, as root
"""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "mariadbd", "mysql_install_db", "slurmdbd", "slurmctld", "slurmd", "sacctmgr", "scontrol")
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge slurmdbd mariadb-server"
_SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONTROLLER = """\
ClusterName=lra
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge.socket
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=1
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory={megabytes} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

ACCOUNTING = """\
DbdHost=localhost
DbdPort={accounting_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=_SEARCH) is None]


@contextmanager
def one_node() -> Iterator[dict[str, str]]:
    """Bring it up; yields the environment in which sbatch, squeue and the rest talk to it. All daemons are children of
    this process, in the foreground, and end with the block."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    environment = {
        **os.environ, "PATH": _SEARCH, "SLURM_CONF": f"{folder}/slurm.conf", "MYSQL_UNIX_PORT": f"{folder}/database.socket",
    }  # fmt: skip
    _write_configuration(folder)
    with ExitStack() as daemons:
        daemons.callback(shutil.rmtree, folder, ignore_errors=True)

        def start(name: str, *arguments: str, ready: Callable[[], bool]) -> None:
            log = daemons.enter_context(open(folder / f"{name}.out", "wb"))
            command = [shutil.which(name, path=_SEARCH) or name, *arguments]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            daemons.callback(_end, process)
            _wait(ready, process, folder / f"{name}.out")

        def answers(*command: str, expected: str = "") -> bool:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
            return done.returncode == 0 and expected in done.stdout

        start(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed",
            ready=(folder / "munge.socket").exists,
        )  # fmt: skip
        subprocess.run(
            ["mysql_install_db", "--no-defaults", "--user=root", f"--datadir={folder}/database", "--skip-test-db"],
            env=environment, capture_output=True, check=True,
        )  # fmt: skip
        start(
            "mariadbd", "--no-defaults", "--user=root", f"--datadir={folder}/database", "--skip-networking",
            f"--socket={folder}/database.socket", f"--pid-file={folder}/mariadbd.pid", "--skip-grant-tables",
            "--innodb-buffer-pool-size=64M", ready=(folder / "database.socket").exists,
        )  # fmt: skip
        start("slurmdbd", "-D", ready=lambda: answers("sacctmgr", "-n", "list", "cluster"))
        subprocess.run(["sacctmgr", "-i", "add", "cluster", "lra"], env=environment, capture_output=True, check=True)
        configuration = f"{folder}/slurm.conf"
        start("slurmctld", "-D", "-f", configuration, ready=lambda: answers("scontrol", "ping", expected="UP"))
        start(
            "slurmd", "-D", "-f", configuration, "-N", _host(),
            ready=lambda: answers("sinfo", "-h", "-p", "main", "-o", "%T", expected="idle"),
        )  # fmt: skip
        daemons.callback(_empty_the_queue, environment)
        yield environment


def _empty_the_queue(environment: dict[str, str]) -> None:
    """A job step is no child of the daemons and outlives them; and only they can end it."""
    subprocess.run(["scancel", "--full", "--user=root"], env=environment, capture_output=True, check=True, timeout=30)
    deadline = time.monotonic() + 60
    while subprocess.run(["squeue", "-h"], env=environment, capture_output=True, check=True, timeout=30).stdout:
        if time.monotonic() > deadline:
            raise TimeoutError(
                "SLURM still has jobs a minute after scancel; look for slurmstepd processes and end them"
            )
        time.sleep(0.5)


def _write_configuration(folder: Path) -> None:
    folder.chmod(0o755)
    for name in ("state", "spool", "database"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    ports = dict(zip(("controller_port", "node_port", "accounting_port"), _free_ports(3), strict=True))
    values = {"folder": folder, "host": _host(), "megabytes": memory * 8 // 10, **ports}
    (folder / "slurm.conf").write_text(CONTROLLER.format(**values))
    (folder / "slurmdbd.conf").write_text(ACCOUNTING.format(**values))
    (folder / "slurmdbd.conf").chmod(0o600)


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def _wait(ready: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 90) -> None:
    limit = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > limit:
            raise RuntimeError(f"{process.args} is not up:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
