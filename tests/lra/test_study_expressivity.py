"""The study of expressivity: the transition of polynomial attention, its closed form, and the trained layer."""

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from attention.base import HeadShape
from attention.polynomial import PolynomialAttention
from lra.studies import expressivity as study_
from lra.studies.expressivity_training import PolynomialLayer, distinct_tokens, num_signs, train
from lra.studies.expressivity_verdicts import closed_threshold, separates, smallest, wilson
from tests.conftest import ROOT


def study_of(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=["experiment=expressivity", *overrides]).study


def polynomial(degree: int, dim: int) -> PolynomialAttention:
    shape = HeadShape(1, dim, 4096)
    return PolynomialAttention(shape, torch.Generator(), degree=degree, scale=1.0, sink=0.0, layer_norm="none").double()


@pytest.mark.parametrize(("length", "degree"), [(256, 4), (1024, 4), (4096, 6)])
def test_polynomial_attention_separates_from_the_reference_degree_on(length, degree):
    """At n = 1024 and degree 4 a readout fires with probability 0.98; 18 of 20 fail by chance once in 140 such tests,
    16 of 20 once in 100,000: hence the rate of 0.8 here."""
    study = study_of("study.draws=2", "study.sign_draws=10")
    frame = study_.separation(study, "polynomial", length, seed=0)
    rates = frame.groupby(["degree", "set"])["fires"].mean().unstack()
    assert (rates[0] == 0).all()
    assert all(rates.loc[other, 1] >= 0.8 for other in (4.0, 6.0, 8.0) if other >= degree)
    assert all(rates.loc[other, 1] == 0 for other in (2.0, 4.0) if other < degree)


def test_the_closed_form_has_the_same_thresholds_and_weights():
    study = study_of()
    closed = study_.closed_form(study)
    assert [closed_threshold(closed, length) for length in (256, 1024, 4096)] == [4, 4, 6]
    assert study_.firing_probability(1024, 4, 1.0, study)[1] == pytest.approx(0.47, abs=0.005)
    assert study_.firing_probability(4096, 4, 1.0, study)[1] == pytest.approx(0.2045, abs=0.0005)
    assert study_.firing_probability(256, 8, 0.05, study)[0] == 0


def test_the_closed_form_is_the_measured_rate_between_0_and_1():
    """a = 0.985 at n = 1024 and degree 4: neither 0 nor 1. 600 readouts; four standard errors, once in 15,000 by chance."""
    study = study_of("study.draws=6", "study.sign_draws=100", "study.data.large=0.985")
    frame = study_.separation(study, "polynomial", 1024, seed=3)
    measured = frame[(frame["degree"] == 4) & (frame["set"] == 1)]["fires"].mean()
    predicted, weight = study_.firing_probability(1024, 4, 0.985, study)
    assert 0.05 < predicted < 0.95
    assert abs(measured - predicted) < 4 * np.sqrt(predicted * (1 - predicted) / 600)
    assert frame[(frame["degree"] == 4) & (frame["set"] == 1)]["own_weight"].iloc[0] == pytest.approx(weight, rel=1e-9)


@pytest.mark.parametrize("place", [0, 7, 63])
def test_distinct_tokens_stand_for_all_of_them(place):
    study = study_of()
    x = study_.tokens(64, 1.0, study.data, place)
    kinds = study_.distinct(64, place)
    assert len(torch.unique(x, dim=0)) == len(kinds) == 9
    assert len(torch.unique(x[kinds], dim=0)) == 9
    whole = polynomial(4, 10)(x[None, None], x[None, None], x[None, None], None)[0, 0]
    some = polynomial(4, 10)(x[None, None, kinds], x[None, None], x[None, None], None)[0, 0]
    assert {tuple(row) for row in whole.numpy().round(10)} == {tuple(row) for row in some.numpy().round(10)}


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_the_trained_layer_starts_as_polynomial_attention_of_all_tokens(degree):
    study = study_of()
    x, counts = distinct_tokens(64, torch.tensor([[0.8]]), study.data)
    layer = PolynomialLayer(1, 10, 5, 1.3, degree, "projections", torch.Generator().manual_seed(0))
    mine = layer.attend(x, counts)[0, 0]
    full = study_.tokens(64, 0.8, study.data, 0)
    reference = polynomial(degree, 10)(
        full[None, None, study_.distinct(64, 0)], full[None, None], full[None, None], None
    )
    torch.testing.assert_close(mine.double(), reference[0, 0], rtol=1e-4, atol=1e-5)
    assert counts.sum() == 64


def test_sketches_need_a_higher_degree_and_softmax_a_temperature():
    study = study_of("study.draws=4", "study.sign_draws=10")
    frames = [study_.separation(study, name, 1024, seed=0) for name in ("polynomial", "polysketch_32", "softmax")]
    rates = separates(pd.concat(frames, ignore_index=True))
    assert smallest(rates, "polynomial", 1024, "degree") == 4
    assert not smallest(rates, "polysketch_32", 1024, "degree") <= 4
    assert smallest(rates, "softmax", 1024, "temperature") == 8
    plain = rates[(rates["mechanism"] == "softmax") & rates["temperature"].isna()]
    assert plain[1].item() == 0


def test_schoenbat_does_not_separate_as_it_is():
    study = study_of("study.draws=3", "study.sign_draws=10", "study.mechanisms.schoenbat.temperatures=[null]")
    frame = study_.separation(study, "schoenbat", 256, seed=0)
    assert (frame["fires"] == 0).all()


def test_training_the_projections_moves_the_transition_down():
    study = study_of("study.training.seeds=3", "study.training.steps=60", "study.training.num_test=64")
    before, after = train(study, 256, 4, "projections", seed=0)
    assert max(before) < 0.95 < min(after)


def test_a_length_without_a_construction_is_refused():
    with pytest.raises(ValueError, match="holds 1000, which is no square"):
        study_.copies_of(1000)


def test_the_readout_has_the_stated_number_of_signs():
    assert [num_signs(length, study_of().readout) for length in (256, 1024, 4096)] == [82, 93, 104]


def test_wilsons_interval_does_not_leave_0_and_1():
    assert wilson(0.0, 20)[0] == 0.0
    assert 0.1 < wilson(0.0, 20)[1] < 0.2
    assert wilson(1.0, 20)[1] == 1.0
