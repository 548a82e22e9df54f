"""torch.compile is an option of a run: another run, the same function, the same names of weights."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from lra.compilation import compiled
from lra.identity import identity_of, run_id_of
from tests.conftest import ROOT


def test_a_compiled_model_is_the_same_function_with_the_same_names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    x, names = torch.randn(3, 4), list(model.state_dict())
    expected = model(x)
    assert compiled(model, "default", backend="aot_eager") is model
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == names


def test_an_unknown_mode_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="compile='fast' is unknown; choose null, default, reduce-overhead"):
        compiled(nn.Linear(1, 1), "fast")


def test_a_compiled_run_is_another_run():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plain, other = (compose("config", overrides=[*NAMES, *more]) for more in ([], ["compile=default"]))
    assert run_id_of(identity_of(plain)) != run_id_of(identity_of(other))
    assert "compile" not in identity_of(plain)


NAMES = ["names.task=listops", "names.attention=softmax", "names.protocol=quick"]
