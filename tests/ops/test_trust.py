"""What a configuration may name, what a run may tell, and whom it may call: nothing beyond this project."""

import os
import signal
import subprocess
import sys

import pytest

from lra.targets import is_ours
from tests.conftest import ROOT
from tests.lra.test_cli import TINY
from tests.ops import isolation

SECRETS = {
    "WANDB_API_KEY": "planted0wandb0key0planted0wandb0key0abcd",
    "HF_TOKEN": "hf_plantedhuggingfacetoken",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/secret/key",
    "GITHUB_TOKEN": "ghp_plantedgithubtoken",
    "SOME_PASSWORD": "planted-password",
}


@pytest.mark.skipif(not isolation.available(), reason="needs Linux on x86-64 or 64-bit Arm")
def test_the_ban_on_sockets_is_felt_by_whoever_opens_one():
    for family, code in (("AF_INET", -signal.SIGSYS), ("AF_INET6", -signal.SIGSYS), ("AF_UNIX", 0)):
        done = subprocess.run(
            [sys.executable, "-c", f"import socket; socket.socket(socket.{family})"],
            preexec_fn=isolation.forbid_internet_sockets, check=False, capture_output=True,
        )  # fmt: skip
        assert done.returncode == code, family


@pytest.mark.skipif(not isolation.available(), reason="needs Linux on x86-64 or 64-bit Arm")
def test_an_offline_grid_opens_no_socket_and_tells_no_secret(tmp_path):
    """Also where a cell fails: errors and logs count as artefacts."""
    environment = {
        **os.environ, **SECRETS, "LRA_RUNS": str(tmp_path / "runs"), "LRA_DATASETS": str(tmp_path / "datasets"),
        "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, str(ROOT / "run.py"), "experiment=quick", *TINY, "attention=mean_pool", "tracking=offline",
        "protocol.learning_rate=1e-3,1e30", "protocol.gradient_clip=none",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, timeout=240, check=False, stdin=subprocess.DEVNULL,
        preexec_fn=isolation.forbid_internet_sockets,
    )  # fmt: skip
    assert done.returncode == 1 and b"1 of 2 runs failed" in done.stderr, done.stderr.decode()
    artefacts = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    artefacts |= {"stdout": done.stdout, "stderr": done.stderr}
    assert any("offline-run-" in str(name) and str(name).endswith(".wandb") for name in artefacts)
    assert sum("/ledger/" in str(name) and str(name).endswith(".json") for name in artefacts) == 2
    for secret in SECRETS.values():
        assert [str(name) for name, content in artefacts.items() if secret.encode() in content] == []


@pytest.mark.parametrize(
    ("target", "ours"),
    [
        ("attention.softmax.Softmax", True),
        ("lra.experiment.train", True),
        ("os.system", False),
        ("builtins.eval", False),
        ("torch.hub.load", False),
        ("lra.provenance.subprocess.run", False),  # reached through our own module, and not ours
        ("lra.provenance.Path", False),
        ("lra.experiment._test", True),
        ("attention.softmax.Missing", False),
        ("attention.softmax.Softmax; import os", False),
        ("../attention.softmax.Softmax", False),
        ("Softmax", False),
        ("", False),
    ],
)
def test_what_counts_as_ours(target, ours):
    assert is_ours(target) is ours


def test_every_target_that_the_configuration_names_is_ours():
    import yaml

    from tests.test_house import nodes_with_target

    for path in (ROOT / "conf").rglob("*.yaml"):
        for node in nodes_with_target(yaml.safe_load(path.read_text())):
            target = node["_target_"]
            if "hydra" in path.relative_to(ROOT / "conf").parts:  # Hydra's own plugins: Hydra refuses all others itself
                assert target.startswith("hydra_plugins."), f"{path}: {target}"
            elif "${" not in target:
                assert is_ours(target), f"{path}: {target}"


def test_a_foreign_target_is_refused_with_its_node_before_it_is_called(run_cli, tmp_path):
    evil = f"+attention.evil={{_target_: os.mkdir, path: {tmp_path}/called}}"
    done = run_cli(*TINY, "tracking=disabled", "attention=mean_pool", evil)
    assert done.returncode == 1 and "attention.evil._target_=os.mkdir" in done.stderr
    assert "allow_foreign_targets=true" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "called").exists()
    run_cli(*TINY, "tracking=disabled", "attention=mean_pool", evil, "allow_foreign_targets=true")
    assert (tmp_path / "called").exists()
