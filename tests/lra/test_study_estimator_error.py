"""The study of estimator error: its configuration reaches every estimator, its errors are what they say."""

import json

import hydra
import pandas as pd
import pytest
import torch

from lra.studies import estimator_error as study_module
from lra.studies.runner import Verdict, median_and_interval
from tests.conftest import ROOT

TINY = ("study.scales.quick.draws=2", "study.scales.quick.length=16", "study.scales.quick.timing_rounds=1")


@pytest.fixture
def study():
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("config", overrides=["experiment=estimator_error", *TINY]).study


def errors_at(study, name: str, width: int, kernel: str = "exp", temperature: float = 1.0, draws: int = 4) -> float:
    """Median output error on isotropic data."""
    study.cell.kernel, study.cell.temperature = f"${{study.kernels.{kernel}}}", temperature
    shape = hydra.utils.instantiate(study.shape)
    exact = hydra.utils.instantiate(study.exact)(shape, torch.Generator())
    which, found = study_module.estimator(study, name, width), []
    for seed in range(draws):
        inputs = study_module.draw_inputs(shape, 64, [0.0], seed, torch.device("cpu"))
        kernel_matrix = exact(inputs.q, inputs.k, torch.eye(64).expand(1, 1, -1, -1))
        sums = kernel_matrix.sum(dim=-1, keepdim=True)
        estimated = study_module.estimate(which, shape, seed, inputs, sums)
        out = kernel_matrix @ inputs.v / sums
        found.append(study_module.errors_of(*estimated, kernel_matrix, out, inputs.v)[0, 1])
    return float(torch.stack(found).median())


def test_every_estimator_takes_kernel_width_and_temperature_from_the_cell(study):
    for name, entry in study.estimators.items():
        kernels = entry.get("kernels", list(study.kernels))
        study.cell.temperature = 2.0
        for kernel in kernels:
            study.cell.kernel = f"${{study.kernels.{kernel}}}"
            for width in [entry.width] if "width" in entry else [64, 128]:
                study.cell.num_features = width
                node = study_module.attention_node(entry)
                assert node.feature_map.num_features == width, (name, width)
                if "kernel" in node.feature_map:
                    assert node.feature_map.kernel == study.kernels[kernel], (name, kernel)
                assert "temperature" not in node or node.temperature.value == (1.0 if name == "rmfa" else 2.0), name


def test_the_known_order_of_the_estimators_at_128_features(study):
    published, plus = errors_at(study, "published", 128), errors_at(study, "plus", 128)
    assert 0.5 < published < 0.9
    assert plus < 0.03
    assert errors_at(study, "exact2", 561) < plus / 5
    assert errors_at(study, "plus", 128, kernel="sqrt") < 0.02


def test_errors_of_the_exact_attention_are_zero_and_of_mean_pooling_one(study):
    shape = hydra.utils.instantiate(study.shape)
    inputs = study_module.draw_inputs(shape, 16, [0.0, 0.5], 0, torch.device("cpu"))
    kernel = (inputs.q @ inputs.k.transpose(-2, -1) / 32**0.5).exp()
    out = kernel @ inputs.v / kernel.sum(dim=-1, keepdim=True)
    assert study_module.errors_of(kernel, out, kernel, out, inputs.v).abs().max() == 0
    pooled = inputs.v.mean(dim=2, keepdim=True).expand_as(out)
    torch.testing.assert_close(
        study_module.errors_of(kernel + 2, pooled, kernel, out, inputs.v), torch.tensor([[2.0, 1.0]] * 2)
    )


def test_inputs_are_what_a_pre_sbn_leaves_and_share_the_direction_that_they_say(study):
    shape = hydra.utils.instantiate(study.shape)
    q, k, _ = study_module.draw_inputs(shape, 500, [0.0, 0.5], 3, torch.device("cpu"))
    assert torch.allclose(q.norm(dim=-1), torch.ones(2, 1, 500)) and q.mean(dim=-1).abs().max() < 1e-6
    cosine = (q.mean(dim=2) * k.mean(dim=2)).sum(dim=-1)[
        :, 0
    ]  # of two means of 500: the squared share of the direction
    assert cosine[0].abs() < 0.02 and abs(cosine[1] - 0.5) < 0.05


def test_the_command_leaves_tables_figures_and_provenance(run_cli, tmp_path):
    done = run_cli("experiment=estimator_error", *TINY, "study.num_features=[64,128]", "threads=1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "studies" / "estimator_error"
    content = json.loads((folder / "study.json").read_text())
    assert content["provenance"]["hardware"]["cpu"] and content["seed"] == 0 and content["config"]["draws"] == 2
    assert {path.name for path in folder.iterdir()} == {*content["files"], "study.json"}
    assert "output_error_isotropic.pdf" in content["files"]
    errors = pd.read_csv(folder / "errors.csv")
    assert set(errors["kernel"]) == {"exp", "inverse", "log", "sqrt"} and (errors["draws"] == 2).all()
    assert "### Estimator error at |x|^2 = 0.177, isotropic q and k" in done.stdout
    (run,) = (tmp_path / "runs" / "wandb").glob("offline-run-*")
    assert {path.name.split("_")[0] for path in run.rglob("*.table.json")} == {"errors", "times", "verdicts"}
    wrong = run_cli("experiment=estimator_error", "study.scale=papr", "tracking=disabled")
    assert wrong.returncode == 1 and "choose one of paper, quick" in wrong.stderr


def test_intervals_cover_what_they_should():
    """200 samples of 50 exponential numbers: the true median lies outside for at most 5 %, and 20 of 200 never happens
    by chance above 0.3 %."""
    draws = torch.empty(200, 50).exponential_(generator=torch.Generator().manual_seed(0)).tolist()
    outside = [not low <= 0.6931 <= high for _, low, high in map(median_and_interval, draws)]
    assert sum(outside) < 20


def test_a_verdict_says_number_interval_and_conditions():
    verdict = Verdict("it is so", "reproduced under conditions", 0.5, (0.4, 0.6), "sometimes")
    assert verdict.line() == "REPRODUCED UNDER CONDITIONS: it is so: 0.5 [0.4, 0.6] (sometimes)"
