"""The GPU op is its plain twin: outputs, every gradient, masks, odd lengths, all head sizes; and it runs where it can.

Without a GPU its kernels run in Triton's interpreter, at small sizes, on the CPU; with one they are compiled.
"""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from attention.fused import engines
from attention.fused.engines import engine_for
from tests.attention.conftest import build, draw_qkv

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install --require-hashes --no-deps -r requirements/triton.txt",
)
# seen in the interpreter: 1e-6, without a normaliser's floor near zero 3e-5, bf16 7e-3 (its own rounding is 4e-3).
# Compiled, products of float32 are three of tf32 and divisions are off by two units in the last place
FLOAT32, BF16 = (2e-3 if GPU else 2e-4), 2e-2


def run_checks(device: str, *groups: str) -> str:
    """In a process of its own: the interpreter has to be chosen before triton is imported."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    command = [sys.executable, "-m", "tests.attention.triton_checks", device, *groups]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
@pytest.mark.parametrize(
    "groups", [("mechanisms", "layouts", "self-check"), ("degrees", "normalisers", "bf16")], ids="-".join
)
def test_the_gpu_op_is_the_plain_form(groups: tuple[str, ...]) -> None:
    found = json.loads(run_checks("cuda" if GPU else "cpu", *groups))
    assert found
    wrong = {name: e for name, e in found.items() if not max(e) < (BF16 if "bf" in name else FLOAT32)}
    assert not wrong, f"relative errors of the output and of each gradient: {wrong}"


@needs_triton
@pytest.mark.skipif(GPU, reason="with a GPU the other tests compile")
def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter accepts what the compiler does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    run_checks("90", "compiled")


def test_attention_is_imported_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import attention.schoenbat, attention.fused.engines
print([name for name in sys.modules if name.startswith("attention.fused.triton")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_on_a_cpu_the_engine_in_blocks_runs_whatever_is_installed() -> None:
    q, _, v = draw_qkv(9)
    assert engine_for(q, v) is engines._CPU


def test_half_precision_on_a_cpu_is_computed_in_float32() -> None:
    module, inputs = build("schoenbat_plus_exp", dtype=torch.float32), [x.bfloat16() for x in draw_qkv(37)]
    out = module(*inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, module(*(x.float() for x in inputs)).bfloat16(), rtol=0.0, atol=0.0)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch):
    """Triton is there, and the self-check gives what a test wants it to give."""
    engines._on_gpu.cache_clear()
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield monkeypatch
    engines._on_gpu.cache_clear()


CASE = (torch.device("cuda", 0), torch.float32, 32, 32)


@needs_triton
def test_the_gpu_op_runs_once_it_has_passed_its_self_check(pretended_gpu) -> None:
    pretended_gpu.setattr(engines, "deviation", lambda *case: 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engines._on_gpu(*CASE).takes_bf16
        assert engines._on_gpu(CASE[0], torch.float64, 32, 32) is None
        assert engines._on_gpu(CASE[0], torch.bfloat16, 160, 32) is None


@needs_triton
@pytest.mark.parametrize("fault", ["wrong result", "no compiler"])
def test_a_gpu_op_that_fails_its_self_check_gives_way_to_the_plain_form_and_says_so(pretended_gpu, fault: str) -> None:
    def deviation(*case: object) -> float:
        if fault == "no compiler":
            raise RuntimeError(fault)
        return 0.5

    pretended_gpu.setattr(engines, "deviation", deviation)
    expected = "differs from the definition's by 0.5" if fault == "wrong result" else "RuntimeError: no compiler"
    with pytest.warns(UserWarning, match=expected):
        assert engines._on_gpu(*CASE) is None


def test_older_gpus_run_the_plain_form(pretended_gpu) -> None:
    pretended_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert engines._on_gpu(*CASE) is None


@pytest.mark.skipif(not GPU, reason="no GPU here")
@needs_triton
def test_on_a_gpu_the_op_is_in_use() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 2, 70, 32, device="cuda", dtype=dtype)
        assert engine_for(x, x) not in (None, engines._CPU)
