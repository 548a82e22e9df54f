"""The backbone: published parameter counts, masks, one initial backbone for every attention."""

import functools

import pytest
import torch

from attention.base import Attention, Description
from models.classifier import SequenceClassifier


class Uniform(Attention):
    """Mean over real keys."""

    description = Description(paper="-", exact=True, complexity="L D")

    def __init__(self, shape, generator):
        super().__init__()

    def mix(self, q, k, v, key_padding_mask):
        keep = torch.ones_like(v[..., :1]) if key_padding_mask is None else (~key_padding_mask)[:, None, :, None].to(v)
        return ((v * keep).sum(2, keepdim=True) / keep.sum(2, keepdim=True)).expand_as(v)


class Learned(Uniform):
    def __init__(self, shape, generator):
        super().__init__(shape, generator)
        self.weight = torch.nn.Linear(shape.head_dim, shape.head_dim)
        self.draw = torch.nn.Parameter(torch.randn(3, generator=generator))

    def mix(self, q, k, v, key_padding_mask):
        return self.weight(super().mix(q, k, v, key_padding_mask)) * self.draw.sum() + q * k


def build(attention=Uniform, *, seed=0, **changed):
    settings = dict(
        vocab_size=32, num_classes=10, num_sequences=1, max_len=2000, dim=64, num_layers=2, num_heads=2, mlp_dim=128,
        dropout=0.1, pooling="mean", full_precision_attention=True, activation_checkpointing=False,
    )  # fmt: skip
    return SequenceClassifier(attention, seed=seed, **{**settings, **changed})


@pytest.mark.parametrize(
    ("task", "expected", "facts"),
    [
        ("listops", 209_802, dict(vocab_size=32, max_len=2000, num_classes=10)),
        ("text", 370_562, dict(vocab_size=512, max_len=4000, num_classes=2)),
        ("retrieval", 395_138, dict(vocab_size=512, max_len=4000, num_classes=2, num_sequences=2)),
        ("image", 158_602, dict(vocab_size=256, max_len=1024, num_classes=10)),
        ("pathfinder", 173_954, dict(vocab_size=512, max_len=1024, num_classes=2)),
    ],
)
def test_parameter_count_is_the_published_one(task, expected, facts):
    assert sum(p.numel() for p in build(**facts).parameters()) == expected


def test_two_attentions_under_one_seed_start_from_the_same_backbone():
    plain, learned = build(Uniform).state_dict(), build(Learned).state_dict()
    for name, value in plain.items():
        assert torch.equal(value, learned[name]), name


def test_two_layers_never_share_an_attention():
    model = build(Learned)
    first, second = (block.attention.attention for block in model.encoder.blocks)
    assert first is not second
    assert not torch.equal(first.draw, second.draw)


def test_another_seed_gives_another_model_and_global_randomness_does_not():
    torch.manual_seed(1)
    first = build(seed=3).state_dict()
    torch.manual_seed(2)
    again, other = build(seed=3).state_dict(), build(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.token_embedding.weight"], other["encoder.token_embedding.weight"])


@pytest.mark.parametrize("sequences", [1, 2])
def test_logits_do_not_depend_on_padding_or_on_batch_mates(sequences):
    model = build(num_sequences=sequences, max_len=64).eval()
    tokens = torch.randint(1, 32, (3, sequences, 20), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([20, 11, 1])[:, None].expand(3, sequences)
    mask = torch.arange(20) >= lengths[..., None]
    together = model(tokens, mask)
    for row, length in enumerate((20, 11, 1)):
        alone = model(tokens[row : row + 1, :, :length], None)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    noise = torch.where(mask, torch.randint(1, 32, tokens.shape), tokens)
    torch.testing.assert_close(model(noise, mask), together, atol=1e-6, rtol=1e-6)


def test_published_pooling_divides_by_the_padded_length():
    model = build(max_len=32, pooling="mean_over_padded_length").eval()
    tokens = torch.randint(1, 32, (1, 1, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[[False] * 4 + [True] * 4]])
    hidden = model.encoder(tokens[:, 0], mask[:, 0])
    expected = model.head(hidden[:, :4].sum(1) / 8)
    torch.testing.assert_close(model(tokens, mask), expected)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = build(Learned, max_len=32, activation_checkpointing=checkpointing).train()
        torch.manual_seed(0)
        tokens = torch.randint(1, 32, (2, 1, 9), generator=torch.Generator().manual_seed(1))
        model(tokens, None).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_the_slot_sees_float32_under_autocast_unless_told_otherwise():
    seen = []

    class Spy(Uniform):
        native_half_precision = True

        def mix(self, q, k, v, key_padding_mask):
            seen.append(v.dtype)
            return super().mix(q, k, v, key_padding_mask)

    tokens = torch.ones(1, 1, 4, dtype=torch.int64)
    for full_precision in (True, False):
        model = build(Spy, num_layers=1, max_len=8, full_precision_attention=full_precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(tokens, None)
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(num_heads=3), "model.dim=64 is not divisible by model.num_heads=3"),
        (dict(pooling="max"), "choose one of mean"),
    ],
)
def test_impossible_shapes_say_what_to_change(changed, message):
    with pytest.raises(ValueError, match=message):
        build(**changed)


def test_a_sequence_longer_than_the_position_table_is_refused():
    with pytest.raises(ValueError, match="longer than the model's 16 positions"):
        build(max_len=16)(torch.ones(1, 1, 17, dtype=torch.int64), None)


def test_every_parameter_gets_a_gradient():
    model = build(functools.partial(Learned), num_sequences=2, max_len=16)
    model(torch.randint(1, 32, (2, 2, 16)), None).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
