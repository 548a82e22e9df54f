"""The house keeps its rules: who imports whom, one file one owner, no shared state between layers, no **kwargs."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("attention", "models", "data", "lra")
OURS = {*ROOMS, "conf", "run"}
ALLOWED = {
    "attention": {"attention", "torch", "triton"},
    "models": {"models", "torch", "attention"},
    "data": {"data", "torch", "numpy", "numba", "PIL", "pyarrow", "datasets", "tensorflow_datasets", "huggingface_hub"},
    "lra": {
        "lra", "data", "torch", "numpy", "pandas", "scipy", "matplotlib", "plotly", "rich", "hydra", "omegaconf", "wandb",
        "sklearn", "jinja2", "wandb_workspaces", "PIL",
    },
}  # fmt: skip
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top in ALLOWED[room] or top in sys.stdlib_module_names, f"{room} may not import {name}"
        if room == "models" and top == "attention":
            assert name == "attention.base", "models know the contract of the slot, never a mechanism"
        if room == "lra" and top == "data":
            assert name in ("data.base", "data.encoded"), "lra gets tasks already built"
        if top == "wandb":
            assert path.name in ("tracking.py", "dashboard.py"), "wandb lives in lra/tracking.py"
        if name in ("socket", "requests", "urllib.request", "http.client"):
            assert path.name == "sources.py", "the network is reached from data/sources.py alone"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_what_it_owns_and_stays_small(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "the file opens with a sentence that says what it owns"
    assert text.count("\n") <= 330, "no file above about 300 lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_constructor_takes_kwargs(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            assert node.args.kwarg is None, f"{path}:{node.lineno}"


def test_our_packages_are_the_ones_imported():
    for name in ROOMS:
        assert Path(importlib.import_module(name).__file__).parent == ROOT / name


def test_a_folder_of_that_name_elsewhere_does_not_shadow_ours(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise ImportError('shadowed')")
    code = "import data, sys; print(data.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONSAFEPATH": "1"}
    )
    assert done.stdout.strip() == str(ROOT / "data" / "__init__.py"), done.stderr


def test_every_package_is_listed_for_installation():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for room in (*ROOMS, "conf")
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert listed == found


def nodes_with_target(node, inside_partial=False):
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from nodes_with_target(value)
    elif isinstance(node, list):
        for value in node:
            yield from nodes_with_target(value)


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "attention").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_stateful_node_is_shared_between_layers(path):
    """A node that builds an nn.Module must be a partial: instantiated once, it would sit in every layer."""
    from torch import nn

    config = yaml.safe_load(path.read_text())
    assert path.read_text().startswith("#"), "the file opens with a comment: what it is, and the paper"
    for node in nodes_with_target(config):
        module, _, name = node["_target_"].rpartition(".")
        assert module.split(".")[0] == "attention"
        target = getattr(importlib.import_module(module), name)
        if isinstance(target, type) and issubclass(target, nn.Module):
            assert node.get("_partial_") is True, f"{node['_target_']} needs `_partial_: true`"


def test_the_lock_pins_every_package_with_hashes_and_names_no_address():
    text = (ROOT / "requirements" / "requirements.lock").read_text()
    assert "://" not in text
    blocks = [block for block in text.replace("\\\n", " ").splitlines() if block.strip()]
    assert all("==" in block and "--hash=sha256:" in block for block in blocks)
    assert not any(block.startswith(("torch==", "nvidia")) for block in blocks)
    assert (ROOT / "requirements" / "torch.txt").read_text().strip() == "torch==2.13.0"
