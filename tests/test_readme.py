"""The README's worked example does what it says: its files and commands, word for word, in a copy of the project."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.lra.test_cli import TINY

README = (ROOT / "README.md").read_text()


def example(name: str) -> str:
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)```", README, re.S)
    assert found, f"the README has no example {name}"
    return found.group(1)


@pytest.fixture
def copy(tmp_path):
    for name in ("attention", "models", "data", "lra", "conf", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(copy, command: str, *more: str) -> subprocess.CompletedProcess:
    words = shlex.split(command)
    assert words[0] == "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    environment |= {"LRA_RUNS": str(copy / "runs"), "LRA_DATASETS": str(copy / "datasets"), "LRA_ROOT": str(copy)}
    return subprocess.run(
        [sys.executable, *words[1:], *more], cwd=copy, capture_output=True, text=True, timeout=280, env=environment
    )


def test_a_mechanism_with_one_class_and_one_yaml(copy):
    for name in ("attention/squared_relu.py", "conf/attention/squared_relu.yaml"):
        (copy / name).write_text(example(name))
    test, train = example("commands").splitlines()
    tested = run(copy, test, "-p", "no:cacheprovider")
    assert tested.returncode == 0, tested.stdout
    assert "passed" in tested.stdout
    trained = run(copy, train, *TINY[1:], "tracking=disabled")
    assert trained.returncode == 0, trained.stderr
    assert "test accuracy" in trained.stderr


def test_a_combination_with_yaml_only(copy):
    name = "conf/attention/schoenbat_inverse_srht.yaml"
    (copy / name).write_text(example(name))
    done = run(copy, "python run.py attention=schoenbat_inverse_srht", *TINY, "tracking=disabled")
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stderr


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


def test_every_configuration_file_of_the_readme_exists():
    for group, name in re.findall(r"\b(task|attention|protocol|experiment|job|tracking)=([a-z_]+)", README):
        if name not in ("squared_relu", "schoenbat_inverse_srht"):
            assert (ROOT / "conf" / group / f"{name}.yaml").exists(), f"{group}={name}"


def test_the_tables_of_the_readme_are_those_of_the_measured_records():
    (folder,) = (ROOT / "results" / "measured").glob("*/quick")
    for name in ("accuracy.md", "efficiency.md"):
        assert (folder / name).read_text().strip() in README, f"{folder / name} differs from the README"
