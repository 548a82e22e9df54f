"""The loop: schedule, exact resume, divergence, quirks, exact counts."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from data.base import Batch, stream_indices
from lra.checkpoint import load_checkpoint, save_checkpoint
from lra.evaluation import evaluate
from lra.protocol import Protocol
from lra.training import Diverged, TrainStep, build_optimizer, fit

CPU = torch.device("cpu")
PROTOCOL = Protocol(
    name="test", batch_size=16, num_steps=60, learning_rate=5e-2, warmup_steps=10, weight_decay=0.0, betas=(0.9, 0.999),
    eps=1e-8, cycle_momentum=False, gradient_clip="norm", gradient_clip_limit=1.0, micro_batches=1, eval_every=20,
    eval_batch_size=16, validation_batches=None, best_after_fraction=0.0, pad_to_max_len=False, length_bucketing=False,
    log_every=5, checkpoint_every=10, measure_warmup=1, measure_repetitions=3, measure_batch_size=4,
)  # fmt: skip


class Bag(nn.Module):
    """Mean embedding, dropout, linear: small, random, and able to learn the counting task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.dropout, self.head = nn.Embedding(8, 8), nn.Dropout(0.2), nn.Linear(8, 2)

    def forward(self, tokens, key_padding_mask):
        x = self.embedding(tokens[:, 0])
        if key_padding_mask is None:
            return self.head(self.dropout(x.mean(1)))
        keep = (~key_padding_mask[:, 0])[..., None]
        return self.head(self.dropout((x * keep).sum(1) / keep.sum(1)))


def run_fit(task, protocol=PROTOCOL, checkpoint=None, model=None, **hooks):
    model = model or Bag()
    fitted = fit(
        model, task, protocol, seed=0, device=CPU, precision="fp32", checkpoint=checkpoint, identity="abc", **hooks
    )
    return model, fitted


def test_a_fit_learns(counting_task):
    model, fitted = run_fit(counting_task)
    assert fitted.progress.best_accuracy > 0.9
    assert [step for step, _, _ in fitted.progress.val_curve] == [20, 40, 60]
    assert [step for step, _ in fitted.progress.train_curve] == list(range(5, 61, 5))


@pytest.mark.parametrize("stop_after", [1, 10, 17, 20, 45, 59])
def test_a_killed_fit_goes_on_to_bit_identical_weights_and_curves(counting_task, tmp_path, stop_after):
    whole, expected = run_fit(counting_task)

    class Killed(BaseException):
        pass

    def kill(step, loss):
        if step == stop_after:
            raise Killed

    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        run_fit(counting_task, checkpoint=path, on_step=kill)
    torch.manual_seed(999)  # the state of the process that goes on must not matter
    resumed, fitted = run_fit(counting_task, checkpoint=path)
    assert fitted.progress == expected.progress
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
        assert torch.equal(expected.best_weights[name], fitted.best_weights[name])


def test_learning_rate_follows_the_published_one_cycle():
    protocol = dataclasses.replace(PROTOCOL, num_steps=1000, warmup_steps=100, learning_rate=1e-4)
    optimizer, schedule = build_optimizer(Bag(), protocol)
    rates = []
    for _ in range(1000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < 1000:
            schedule.step()
    assert rates[0] == pytest.approx(1e-4 / 25)
    assert rates[99] == pytest.approx(1e-4)
    assert rates[999] == pytest.approx(1e-4 / 250_000)
    assert rates[50] == pytest.approx(1e-4 / 25 + (1e-4 - 1e-4 / 25) * 50 / 99)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_beta1_is_cycled_only_as_the_named_quirk():
    protocol = dataclasses.replace(PROTOCOL, cycle_momentum=True)
    optimizer, schedule = build_optimizer(Bag(), protocol)
    assert optimizer.param_groups[0]["betas"][0] == pytest.approx(0.95)
    for _ in range(9):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["betas"][0] == pytest.approx(0.85)


def test_a_loss_that_is_no_number_stops_the_fit_and_names_the_step(counting_task):
    model = Bag()

    def poison(step, loss):
        if step == 7:
            with torch.no_grad():
                model.head.weight.fill_(float("nan"))

    with pytest.raises(Diverged, match="nan at step 8"):
        run_fit(counting_task, model=model, on_step=poison)


def test_micro_batches_give_the_gradient_of_the_whole_batch(counting_task):
    batch = next(counting_task.batches("train", 16, 0))
    models = []
    for parts in (1, 4):
        model = Bag().eval()
        protocol = dataclasses.replace(PROTOCOL, micro_batches=parts)
        optimizer, _ = build_optimizer(model, protocol)
        TrainStep(model, optimizer, None, protocol, device=CPU, precision="fp32")(batch)
        models.append(model)
    for whole, parts in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


def test_value_clipping_bounds_every_gradient(counting_task):
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.extend(float(p.grad.abs().max()) for group in self.param_groups for p in group["params"])

    model = Bag()
    protocol = dataclasses.replace(PROTOCOL, gradient_clip="value", gradient_clip_limit=1e-3)
    TrainStep(model, Spy(model.parameters(), 0.1), None, protocol, device=CPU, precision="fp32")(
        next(counting_task.batches("train", 16, 0))
    )
    assert max(seen) == pytest.approx(1e-3)


def test_best_weights_are_those_of_the_best_validation(counting_task):
    snapshots = {}
    model = Bag()
    fitted = fit(
        model, counting_task, PROTOCOL, seed=0, device=CPU, precision="fp32", checkpoint=None, identity="abc",
        on_validation=lambda step, counts: snapshots.update({step: (counts.accuracy, copy.deepcopy(model.state_dict()))}),
    )  # fmt: skip
    best_step = max(snapshots, key=lambda step: (snapshots[step][0], -step))
    assert fitted.progress.best_step == best_step
    for name, value in snapshots[best_step][1].items():
        assert torch.equal(value, fitted.best_weights[name])


def test_published_quirk_best_is_kept_only_after_a_share_of_the_steps(counting_task):
    protocol = dataclasses.replace(PROTOCOL, best_after_fraction=1.1)
    model, fitted = run_fit(counting_task, protocol)
    assert fitted.progress.best_step == -1
    for name, value in model.state_dict().items():
        assert torch.equal(value, fitted.best_weights[name])


def test_published_quirk_validation_window_moves(counting_task):
    protocol = dataclasses.replace(PROTOCOL, validation_batches=2)
    totals = []
    run_fit(counting_task, protocol, on_validation=lambda step, counts: totals.append((counts.total, counts.right)))
    assert [total for total, _ in totals] == [32, 32, 32]


def test_evaluation_counts_every_example_once_and_restores_the_mode(counting_task):
    model = Bag().train()
    counts = evaluate(model, counting_task.batches("test", 16), device=CPU, precision="fp32")
    assert (counts.total, model.training) == (67, True)
    model.eval()
    right = [
        int(model(batch.tokens, batch.key_padding_mask).argmax()) == int(batch.labels)
        for batch in counting_task.batches("test", 1)
    ]
    assert counts.right.tolist() == right
    assert counts.correct == sum(right)


def test_the_stream_serves_each_example_once_per_epoch_without_dropping_any():
    taken = np.concatenate([stream_indices(10, 4, 5, step) for step in range(5)])
    assert sorted(taken[:10]) == list(range(10)) == sorted(taken[10:])
    assert taken[:10].tolist() != taken[10:].tolist()


def test_batch_i_of_the_stream_depends_on_seed_and_i_alone(counting_task):
    stream = counting_task.batches("train", 16, 3)
    batches = [next(stream) for _ in range(20)]
    np.random.seed(0)
    late = next(counting_task.batches("train", 16, 3, start=19))
    assert torch.equal(batches[19].tokens, late.tokens)
    assert not torch.equal(batches[0].labels, next(counting_task.batches("train", 16, 4)).labels)


def test_masks_come_from_lengths_and_padding_goes_to_the_longest_or_to_max_len(counting_task):
    batch = next(counting_task.batches("test", 67))
    lengths = counting_task.split("test").lengths()
    assert batch.tokens.shape[-1] == lengths.max()
    assert torch.equal((~batch.key_padding_mask).sum(-1), torch.from_numpy(lengths))
    fixed = next(counting_task.batches("test", 4, pad_to_max_len=True))
    assert fixed.tokens.shape == (4, 1, 24)
    assert (fixed.tokens[fixed.key_padding_mask] == 0).all()


def test_a_damaged_checkpoint_is_refused_with_its_path(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"step": 3}, "abc")
    assert load_checkpoint(path, "abc", CPU)["step"] == 3
    with pytest.raises(ValueError, match=r"x\.pt: the checkpoint belongs to run abc, not to other"):
        load_checkpoint(path, "other", CPU)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"x\.pt: the checkpoint cannot be read"):
        load_checkpoint(path, "abc", CPU)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(warmup_steps=60), "warmup_steps=60 must be at least 2 and below"),
        (dict(micro_batches=3), "batch_size=16 is not divisible"),
        (dict(gradient_clip="abs"), "choose value, norm, none"),
        (dict(eval_every=0), "eval_every=0 must be at least 1"),
    ],
)
def test_impossible_protocols_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PROTOCOL, **changed)


def test_a_batch_moves_as_a_whole():
    batch = Batch(torch.ones(1, 1, 2, dtype=torch.int64), None, torch.zeros(1, dtype=torch.int64))
    assert batch.to(CPU).key_padding_mask is None
