"""Every file of conf/attention/ trains in the shared backbone: steps of a small classifier are finite."""

import pytest
import torch
from torch.nn import functional

from models.classifier import SequenceClassifier
from tests.attention.conftest import CONF, factory_of


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_two_training_steps_are_finite(name: str) -> None:
    model = SequenceClassifier(
        factory_of(name), seed=0, vocab_size=16, num_classes=4, num_sequences=1, max_len=40, dim=16, num_layers=1,
        num_heads=2, mlp_dim=16, dropout=0.1, pooling="mean", full_precision_attention=True,
        activation_checkpointing=False,
    ).train()  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 16, (3, 1, 40), generator=generator)
    mask = torch.arange(40) >= torch.tensor([40, 23, 1])[:, None, None]  # the last example has one real token
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        loss = functional.cross_entropy(model(tokens, mask), torch.tensor([0, 1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    for key, value in model.named_parameters():
        assert value.isfinite().all(), key
        if value.grad is None:  # a mechanism may look at no query or no key at all
            assert ".attention.query." in key or ".attention.key." in key, key
        else:
            assert value.grad.isfinite().all(), key
    assert model.encoder.blocks[0].attention.value.weight.grad.abs().max() > 0
