"""Statistics: known values by hand, refusals, and the false-alarm rate of the paired test under its hypothesis."""

import dataclasses

import numpy as np
import pytest

from lra import statistics
from lra.statistics import holm, mcnemar, mean_ranks, paired, right_answers, summarise
from tests.lra.synthetic import make_record


def bits(*values):
    return np.array(values, dtype=bool)


def test_one_value_has_no_spread_and_no_interval():
    one = summarise([40.0])
    assert (one.n, one.mean, one.std, one.low, one.high) == (1, 40.0, None, None, None)


def test_three_values_have_the_t_interval_of_two_degrees_of_freedom():
    three = summarise([10.0, 20.0, 30.0])
    assert three.mean == 20 and three.std == pytest.approx(10)
    assert three.high - 20 == pytest.approx(4.302653 * 10 / 3**0.5, rel=1e-6)
    assert 20 - three.low == pytest.approx(three.high - 20)


def test_no_value_is_refused():
    with pytest.raises(ValueError, match="no value"):
        summarise([])


def test_right_answers_come_back_bit_for_bit_at_any_length():
    for total in (1, 7, 8, 9, 200):
        right = np.random.default_rng(total).random(total) < 0.5
        assert (right_answers(make_record(right=right)) == right).all()


def test_bits_that_contradict_the_counts_are_refused():
    record = make_record(right=bits(1, 0, 1))
    best = {**record.result["test_best"], "correct": 3}
    with pytest.raises(ValueError, match=f"record {record.run_id}: its per-example bits"):
        right_answers(dataclasses.replace(record, result={**record.result, "test_best": best}))


def test_mcnemar_is_the_exact_binomial_test_on_the_discordant_examples():
    a, b = np.zeros(100, dtype=bool), np.zeros(100, dtype=bool)
    a[:5], b[5:20] = True, True
    assert mcnemar(a, b) == pytest.approx(
        2 * 21700 / 2**20
    )  # 2 P(X <= 5), X binomial(20, 1/2): sum of C(20, k) is 21700
    assert mcnemar(a, a) == 1.0


def test_one_seed_is_tested_by_mcnemar_and_several_by_the_bootstrap():
    a = {seed: make_record(attention="a", seed=seed, accuracy=0.7) for seed in range(3)}
    b = {seed: make_record(attention="b", seed=seed, accuracy=0.4) for seed in range(3)}
    one, all_of_them = paired({0: a[0]}, {0: b[0]}), paired(a, b)
    assert one.method == "McNemar, exact"
    assert one.p_value == pytest.approx(mcnemar(right_answers(a[0]), right_answers(b[0])))
    assert all_of_them.method.startswith("bootstrap") and all_of_them.seeds == (0, 1, 2)
    assert all_of_them.low < all_of_them.difference < all_of_them.high and all_of_them.p_value < 1e-6
    assert all_of_them.only_a - all_of_them.only_b == pytest.approx(all_of_them.difference * 600)


def test_the_sign_says_who_is_ahead():
    better, worse = make_record(right=bits(1, 1, 1, 0)), make_record(right=bits(1, 0, 0, 0))
    assert paired({0: better}, {0: worse}).difference == 0.5
    assert paired({0: worse}, {0: better}).difference == -0.5


def test_what_cannot_be_paired_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="no seed in common"):
        paired({0: make_record()}, {1: make_record(seed=1)})
    with pytest.raises(ValueError, match="the test examples differ"):
        paired({0: make_record()}, {0: make_record(source="official")})


def test_both_ways_to_draw_examples_give_the_same_standard_error(monkeypatch):
    """Relative error of a standard deviation from 20,000 draws is 0.5 %; 3 % is six of them."""
    difference = np.random.default_rng(0).integers(-1, 2, (3, 500)).astype(np.int8)
    widths = []
    for threshold in (0, 10**9):
        monkeypatch.setattr(statistics, "_MANY_COLUMNS", threshold)
        low, high, _ = statistics._bootstrap(difference, 20_000)
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1], rel=0.03)


def test_false_alarms_of_the_paired_bootstrap_stay_near_five_percent():
    """Two equal attentions, eight seeds, seeds and examples both with effects of their own. Of 200 tests at 5 % at most
    24 may alarm: were the rate 7 % (the bootstrap's own optimism at eight seeds), more would come with probability
    0.003; were it 15 %, they would with probability 0.86."""
    generator, alarms = np.random.default_rng(1), 0
    for _ in range(200):
        hardness = generator.normal(size=300)
        a, b = (generator.normal(size=(8, 300)) + hardness + 0.3 * generator.normal(size=(8, 1)) > 0 for _ in range(2))
        alarms += statistics._bootstrap(a.astype(np.int8) - b.astype(np.int8), 500)[2] < 0.05
    assert alarms <= 24


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_ranks_by_hand_with_nemenyis_critical_difference():
    """q(0.05) for 3 treatments is 2.343 (Demsar 2006, table 5)."""
    ranks = mean_ranks({"a": {"x": 3.0, "y": 9.0}, "b": {"x": 2.0, "y": 8.0}, "c": {"x": 2.0, "y": 1.0}})
    assert dict(ranks.mean) == {"a": 1.0, "b": 2.25, "c": 2.75}
    assert list(ranks.mean) == ["a", "b", "c"]
    assert ranks.critical_difference == pytest.approx(2.343 * (3 * 4 / (6 * 2)) ** 0.5, abs=2e-3)


def test_an_attention_without_all_tasks_is_left_out_by_name():
    rows = {name: {"x": value, "y": value} for name, value in zip("abc", (1.0, 2.0, 3.0), strict=True)}
    assert mean_ranks({**rows, "d": {"x": 9.0}}).left_out == ("d",)


def test_too_little_for_ranks_is_refused():
    with pytest.raises(ValueError, match="three attentions"):
        mean_ranks({"a": {"x": 1.0}, "b": {"x": 2.0}, "c": {"x": 3.0}})


def test_equal_attentions_have_no_difference():
    assert mean_ranks({name: {"x": 1.0, "y": 1.0} for name in "abc"}).friedman_p == 1.0
