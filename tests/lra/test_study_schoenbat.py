"""The studies of SchoenbAt measure what they say: reference values at reduced size, and verdicts that can fail."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import open_dict

from lra.studies import frontier, ppsbn_ablation, ppsbn_training
from lra.studies.mechanisms import Inputs, bootstrap, gaussian_inputs, interleaved_seconds, signal_error
from lra.studies.schoenbat_approximation import error_against_features, slope_of, slope_verdicts
from lra.studies.schoenbat_moments import bound_verdict, estimator_bias, estimator_verdict, moment_verdicts, moments
from lra.studies.schoenbat_regime import EXACT_ONLY, regime, regime_verdicts, summary

CONF = str(Path(__file__).resolve().parents[2] / "conf")


@pytest.fixture(scope="module")
def composed():
    with initialize_config_dir(CONF, version_base="1.3"):
        yield lambda name, *overrides: compose("config", [f"experiment={name}", *overrides]).study


@pytest.fixture(scope="module")
def study(composed):
    return composed("schoenbat_approximation", "study.scales.quick={samples: 20000, bias: 150, slope: 6, regime: 6}")


@pytest.fixture(scope="module")
def catalogue(study):
    return instantiate(study.catalogue)


@pytest.fixture(scope="module")
def measured(study, catalogue):
    return moments(study, catalogue, seed=3)


# x.y = .15 and Rademacher second moment .2092 of one factor; variances of one published feature in closed form
GOLDEN = {"exp": 0.43806255, "inverse": 0.68825220, "log": 0.44653517, "sqrt": 0.10158961}


@pytest.mark.parametrize("kernel", GOLDEN)
def test_the_sampled_variance_is_that_of_the_golden_pair(study, catalogue, kernel):
    """200,000 features, the variance of a variance from the fourth moment: 4.5 sigma, false alarm below 1e-5 each."""
    from lra.studies.schoenbat_moments import single_features

    settings = {"head_dim": 4, "max_len": 2, "seed": 11}
    attention = catalogue.build(f"schoenbat_{kernel}", values={"feature_map.num_features": 200_001}, **settings)
    x = torch.tensor([[0.5, -0.2, 0.1, 0.4]], dtype=torch.float64) * 4**0.25  # the map divides by 4^(1/4)
    y = torch.tensor([[0.3, 0.1, -0.6, 0.2]], dtype=torch.float64) * 4**0.25
    with torch.no_grad():
        samples = single_features(attention.linear.feature_map, x, y)[0]
    kurtosis = float(((samples - samples.mean()) ** 4).mean() / samples.var() ** 2)
    assert abs(float(samples.var()) / GOLDEN[kernel] - 1) < 4.5 * ((kurtosis - 1) / len(samples)) ** 0.5


def test_single_features_have_their_closed_form_mean_and_variance(measured):
    """80 simultaneous tests at 5 %; the seed is fixed, so this does not flicker."""
    assert [verdict.status for verdict in moment_verdicts(measured[0])] == ["reproduced", "reproduced"]


def test_a_biased_estimate_and_a_wrong_variance_are_called_not_reproduced(measured):
    frame = measured[0]
    shifted = frame.assign(mean=frame["mean"] + 0.05)
    assert [verdict.status for verdict in moment_verdicts(shifted)] == ["not reproduced", "reproduced"]
    wider = frame.assign(variance_ratio=frame["variance_ratio"] * 1.5)
    assert [verdict.status for verdict in moment_verdicts(wider)] == ["reproduced", "not reproduced"]


def test_the_concentration_bound_is_never_exceeded_and_a_broken_one_is_noticed(measured, study):
    tail = measured[1]
    assert (tail["measured"] <= tail["hoeffding"]).all()
    found = bound_verdict(tail, study)
    assert found.status == "reproduced under conditions" and found.number > 1e4
    assert bound_verdict(tail.assign(hoeffding=tail["measured"] / 4), study).status == "not reproduced"


def test_estimators_beyond_the_published_one_are_unbiased(study, catalogue):
    chosen = ("published", "stratified degrees", "degrees 0, 1 exact, optimal counts, SRHT")
    with open_dict(study):
        study.estimators = [estimator for estimator in study.estimators if estimator.name in chosen]
    frame = estimator_bias(study, catalogue, seed=0)
    assert list(frame["estimator"].unique()) == list(chosen)
    assert estimator_verdict(frame).status == "reproduced"
    assert estimator_verdict(frame.assign(mean=frame["mean"] + 0.1)).status == "not reproduced"


def test_the_error_falls_as_one_over_the_root_of_the_features(study, catalogue):
    with open_dict(study):
        study.kernels, study.slope.num_features = ["exp", "sqrt"], [16, 128, 1024]
    frame = error_against_features(study, catalogue, seed=0)
    assert all(verdict.status == "reproduced" for verdict in slope_verdicts(frame, 0))
    at_128 = frame[(frame["kernel"] == "exp") & (frame["num_features"] == 128)]["kernel_error"]
    assert at_128.pow(2).mean() ** 0.5 == pytest.approx(2.2e-2, rel=0.15)
    flat = frame.assign(kernel_error=1.0)
    assert slope_of(flat[flat["kernel"] == "exp"], "kernel_error", 0)[0] == pytest.approx(0, abs=1e-9)
    assert slope_verdicts(flat, 0)[0].status != "reproduced"


def test_the_regime_has_its_reference_errors(study, catalogue):
    """Output error over the signal at D = 32, kernel e^t: 0.71 published, 0.022 for exact degrees 0 and 1; and at tau 4.5
    0.82 against 0.10. A draw's spread is 5 % of them."""
    with open_dict(study):
        study.regime.axes = {"tau": [1.0, 4.52548], "head_dim": [8], "common": [0.9]}
        study.regime.kernels = ["exp"]
    table = summary(regime(study, catalogue, seed=0), 0)
    isotropic = table[table["axis"] == "tau"].set_index(["tau", "estimator"])["error"]
    for (tau, estimator), expected in {
        (1.0, "published"): 0.71, (1.0, EXACT_ONLY): 0.022, (4.52548, "published"): 0.82, (4.52548, EXACT_ONLY): 0.10,
    }.items():  # fmt: skip
        assert isotropic[tau, estimator] == pytest.approx(expected, rel=0.2)
    found = regime_verdicts(table, study)
    assert [verdict.status for verdict in found[:3]] == [
        "reproduced", "reproduced under conditions", "reproduced under conditions",
    ]  # fmt: skip


def test_signal_error_of_mean_pooling_is_one():
    data = gaussian_inputs(16, 4, seed=0)
    exact = torch.randn(1, 1, 16, 4)
    assert signal_error(data.v.mean(dim=-2, keepdim=True), exact, data.v) == pytest.approx(1, rel=1e-5)
    assert frontier.own_error(exact, exact, data.v) == 0


def test_inputs_have_unit_entries_and_the_asked_anisotropy():
    plain = gaussian_inputs(4096, 16, seed=1)
    skewed = gaussian_inputs(4096, 16, seed=1, common=0.75, decay=1.0)
    for data in (plain, skewed):
        assert float(data.q.square().mean()) == pytest.approx(1, rel=0.05)
    mean = skewed.k.mean(dim=-2)
    assert float(mean.square().sum() / 16) == pytest.approx(0.75, rel=0.05)


def test_timing_is_interleaved_and_its_warm_up_is_not_counted():
    calls = []
    work = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleaved_seconds(work, 3, torch.device("cpu"))
    assert calls == list("ab" * 4) and all(len(values) == 3 for values in seconds.values())


def test_the_bootstrap_interval_covers_the_mean():
    """200 intervals of 40 draws each: at least 88 % must cover; with 95 % coverage fewer have probability below 1e-4."""
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        _, low, high = bootstrap(generator.normal(size=40), lambda x: float(x.mean()), trial, resamples=200)
        covered += low <= 0 <= high
    assert covered >= 176


# ---- ppSBN


@pytest.fixture(scope="module")
def ablation(composed):
    return composed("ppsbn_ablation", "study.scales.quick.draws=2", "study.scales.quick.restore=2", "study.sizes=[1.0,2.0]",
                    "study.kernels=[exp,inverse]")  # fmt: skip


def test_pre_sbn_keeps_the_domain_and_the_sign_of_denominators(ablation, catalogue):
    frame = ppsbn_ablation.approximate(ablation, catalogue, 0)
    bare, published = (frame[(frame["pre"] == pre) & (frame["tau"] == 1.0)] for pre in ("none", "token"))
    assert published["outside"].max() == 0 and published["negative_denominators"].max() == 0
    assert bare[(bare["kernel"] == "inverse")]["outside"].min() > 0.1
    assert bare[bare["size"] == 2.0]["negative_denominators"].mean() > 0.3
    assert bare[bare["kernel"] == "inverse"]["error"].isna().all()  # nothing to compare with, so no number
    assert ppsbn_ablation.pre_verdicts(frame, ablation, 0)[1].status == "reproduced"


def test_a_temperature_restores_what_gamma_and_beta_cannot(ablation, catalogue):
    frame = ppsbn_ablation.restore(ablation, catalogue, 0)
    mean = frame[frame["size"] == 1.0].groupby("way")["restored"].mean()
    assert mean["temperature"] > 0.85 > mean["gamma and beta"] > mean["gamma"]
    found = ppsbn_ablation.post_verdicts(frame, 0)
    assert [verdict.status for verdict in found] == ["not reproduced", "reproduced", "not reproduced"]


def test_the_fit_of_gamma_and_beta_finds_them():
    x = torch.randn(1, 1, 400, 3)
    target = torch.tensor([2.0, -1.0, 0.5]) * x.sign() * x.abs() ** torch.tensor([0.8, 1.2, 1.0])
    out = ppsbn_ablation.fit_post(x, target, free_power=1, steps=200)
    assert float((out - target).norm() / target.norm()) < 1e-2


def test_an_undecided_training_comparison_says_so():
    seeds = [0, 1, 2]
    runs = pd.DataFrame(
        [{"task": "t", "variant": name, "seed": seed, "accuracy": 0.5 + sign * 0.01 * (seed - 1), "steps": 5,
          "dataset": "t-x", "status": "finished", "loss": 1.0} for name, sign in (("a", 1), ("b", -1)) for seed in seeds]
    )  # fmt: skip
    found = ppsbn_training._difference(runs, "a", "b", "accuracy")
    assert found.status == "not reproduced" and "undecided" in found.conditions
    better = runs.assign(accuracy=runs["accuracy"] + 0.3 * (runs["variant"] == "a"))
    assert ppsbn_training._difference(better, "a", "b", "accuracy").status == "reproduced"


# ---- frontier


def test_the_front_holds_exactly_the_points_that_nothing_beats():
    seconds, errors = np.array([1.0, 2.0, 3.0, 2.5, 1.0]), np.array([3.0, 2.0, 1.0, 2.5, 4.0])
    assert frontier.on_front(seconds, errors).tolist() == [True, True, True, False, False]
    assert frontier._behind(seconds, errors).tolist() == pytest.approx([1, 1, 1, 1.25, 4 / 3])


def test_every_mechanism_of_the_catalogue_is_placed_or_left_out_with_a_reason(composed):
    chosen = composed("frontier")
    placed = [name for members in frontier.families_of(chosen).values() for name in members]
    files = {path.stem for path in (Path(CONF) / "attention").glob("*.yaml")}
    assert set(placed) | set(chosen.left_out) == files
    assert all(chosen.left_out.values())


def test_a_name_that_is_no_file_is_refused(composed):
    with pytest.raises(ValueError, match="nonesuch"):
        frontier.families_of(composed("frontier", "+study.left_out.nonesuch=gone"))


def test_the_frontier_of_three_mechanisms_at_reduced_size(composed, catalogue):
    chosen = composed(
        "frontier", "study.lengths=[64]", "study.scales.quick={draws: 2, rounds: 2}", "study.resamples=20"
    )

    class Here:
        seed, device = 0, torch.device("cpu")

    names = ["schoenbat_exp", "schoenbat_plus_exp", "taylor"]
    times = frontier.measure_times(chosen, catalogue, names, 64, Here)
    errors = frontier.measure_errors(chosen, catalogue, names, 64, Here)
    points = frontier.place_on_front(chosen, errors, times, 0)
    assert len(points) == 6 and points.groupby("inputs")["on_front"].any().all()
    own = points.set_index(["inputs", "attention"])["own_error"]
    assert own["flat", "schoenbat_plus_exp"] < 0.05 < 0.4 < own["flat", "schoenbat_exp"]
    assert own.xs("taylor", level="attention").isna().all()
    assert isinstance(frontier.make_inputs(chosen, "peaked", 64, 0), Inputs)
