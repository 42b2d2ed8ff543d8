"""torch's transformers find out from a mask's values whether it is causal. No mask keeps channels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import autogate
from rewriters import relative_error, run_eval
from tests.rewriters.helpers import classes

TOKENS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))


def causal(length: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


OTHER = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()


class Language(nn.Module):
    """PyTorch's tutorial of a language model: an encoder with a causal mask, which is not said to be one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0)
        self.embed, self.out = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens, mask=None):
        mask = causal(tokens.shape[1]) if mask is None else mask
        return self.out(self.encoder(self.embed(tokens.T), mask)).transpose(0, 1)


class Translator(nn.Module):
    """A decoder whose masks are found to be causal, or are said to be."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.embed, self.out, self.decoder = nn.Embedding(20, 16), nn.Linear(16, 20), nn.TransformerDecoder(layer, 1)

    def forward(self, tokens, mask, **options):
        x = self.embed(tokens)
        return self.out(self.decoder(x, x.flip(1), mask, **options))


def slimmed(model: nn.Module, inputs, dead) -> tuple[nn.Module, nn.Module]:
    """The gated model and the slim one."""
    bank = autogate.gates(model := autogate.prepare(model.double().eval(), inputs, flops=0.9))
    assert autogate.summary(model).reach == 1.0
    with torch.no_grad():
        bank.alpha[dead(bank.channel_map)] = 0
    bank.fold()
    gated = copy.deepcopy(model)
    return gated, autogate.finalize(model, warn=False)


def some(channel_map):
    return slice(0, None, 3)


def assert_same(slim: nn.Module, gated: nn.Module, *calls) -> None:
    for args in calls:
        for training in (False, True):
            got, wanted = (run_eval(one, args) if not training else [one.train()(*args)] for one in (slim, gated))
            assert relative_error(got, wanted) <= 1e-12


@pytest.mark.parametrize(
    "inputs", [TOKENS, pytest.param((TOKENS, OTHER), marks=pytest.mark.slow)], ids=["causal", "other"]
)
def test_an_encoder_loses_heads_hidden_units_and_embedding(inputs):
    gated, slim = slimmed(Language(), inputs, some)
    layer = slim.encoder.layers[0]
    assert layer.self_attn.num_heads < 4
    assert layer.linear1.out_features < 24
    assert layer.linear1.in_features < 16
    calls = [(TOKENS,), (TOKENS[:1, :4],), (TOKENS, causal(6)), (TOKENS, OTHER)]
    assert_same(slim, gated, *(calls if isinstance(inputs, tuple) else calls[:2]))
    assert_same(copy.deepcopy(slim), gated, calls[-1] if isinstance(inputs, tuple) else calls[0])


def test_a_layer_without_hidden_units_takes_both_kinds_of_masks():
    """Its forward is rewritten, too, which must not hold what the mask was in the example."""
    gated, slim = slimmed(
        Language(), (TOKENS, causal(6)), lambda channel_map: classes(channel_map, "encoder.layers.0.linear2.weight", 1)
    )
    assert "forward" in vars(slim.encoder.layers[0])
    assert_same(slim, gated, (TOKENS, causal(6)), (TOKENS[:, :3], causal(3)), (TOKENS, OTHER))


@pytest.mark.slow
def test_a_decoder_takes_masks_that_are_said_to_be_causal_and_others():
    gated, slim = slimmed(Translator(), (TOKENS, causal(6)), some)
    assert slim.decoder.layers[0].self_attn.num_heads < 4
    assert_same(slim, gated, (TOKENS, causal(6)), (TOKENS, OTHER))
    for options in ({"tgt_is_causal": True}, {"tgt_is_causal": False}):
        args = (TOKENS[:1, :4], causal(4))
        assert relative_error(run_eval(slim, args, options), run_eval(gated, args, options)) <= 1e-12
