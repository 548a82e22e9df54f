"""The run as a whole: what is tested, and how often."""

import pytest

import lra.experiment
from lra.experiment import train
from lra.training import Fit, fit
from tests.ops.survival import configured, only_record


@pytest.mark.parametrize(("best_step", "passes"), [(24, 1), (-1, 1), (8, 2)])
def test_the_same_weights_are_tested_once(best_step, passes, tmp_path, monkeypatch):
    tested = []

    def fitted(*arguments, **named) -> Fit:
        done = fit(*arguments, **named)
        done.progress.best_step = best_step
        return done

    def evaluate(*arguments, **named):
        tested.append(counts := evaluate_for_real(*arguments, **named))
        return counts

    evaluate_for_real = lra.experiment.evaluate
    monkeypatch.setattr(lra.experiment, "fit", fitted)
    monkeypatch.setattr(lra.experiment, "evaluate", evaluate)
    train(configured(tmp_path / "runs", tmp_path / "datasets"))
    result = only_record(tmp_path / "runs").result
    assert len(tested) == passes
    assert result["test_final"]["correct"] == tested[0].correct
    assert result["test_best"]["correct"] == tested[-1].correct
