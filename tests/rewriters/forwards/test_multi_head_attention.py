"""torch.nn.MultiheadAttention, and the layers that torch builds from it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autogate
from benchmarks.parts import kill
from rewriters.forwards.multi_head_attention import multi_head_attention, multi_head_attention_forward
from rewriters.outputs import relative_error, run_eval
from tests.rewriters.exactness import TOLERANCE, assert_exact
from tests.rewriters.helpers import Net, analysed, classes

HEADS, EMBED, LENGTH, KEYS, SAMPLES = 4, 16, 5, 6, 2


def tokens(length: int = LENGTH, width: int = EMBED, seed: int = 0) -> torch.Tensor:
    return torch.randn(SAMPLES, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    options = {"batch_first": True, **options}
    made = nn.MultiheadAttention(EMBED, HEADS, **options).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.rand(LENGTH, KEYS, generator=torch.Generator().manual_seed(1)) < 0.3},
    "float": {"attn_mask": torch.randn(LENGTH, KEYS, generator=torch.Generator().manual_seed(1)).double()},
    "of each head": {"attn_mask": torch.randn(SAMPLES * HEADS, LENGTH, KEYS).double()},
    "padding": {"key_padding_mask": torch.arange(KEYS).expand(SAMPLES, -1) > torch.tensor([[3], [4]])},
}
MASKS["both"] = {**MASKS["float"], "key_padding_mask": MASKS["padding"]["key_padding_mask"].double() * -3}

FORMS = {
    "packed": {},
    "without bias": {"bias": False},
    "other widths": {"kdim": 7, "vdim": 9},
    "keys added": {"add_bias_kv": True},
    "zeros added": {"add_zero_attn": True},
    "sequence first": {"batch_first": False},
}


@pytest.mark.parametrize("weights", [False, True, "of each head"])
@pytest.mark.parametrize(("form", "mask"), itertools.product(FORMS, MASKS))
def test_the_written_out_forward_is_torchs(form, mask, weights):
    module = attention(**FORMS[form])
    given = [tokens(), tokens(KEYS, module.kdim, 1), tokens(KEYS, module.vdim, 2)]
    if not module.batch_first:
        given = [one.transpose(0, 1) for one in given]
    options = {"need_weights": bool(weights), "average_attn_weights": weights is True, **MASKS[mask]}
    wanted, got = module(*given, **options), multi_head_attention(module, *given, **options)
    assert relative_error([got[0]], [wanted[0]]) <= TOLERANCE
    assert (wanted[1] is None) == (got[1] is None)
    if weights:
        assert relative_error([got[1]], [wanted[1]]) <= TOLERANCE


def test_the_written_out_forward_is_torchs_for_one_sample_and_causal():
    module, x = attention(), tokens()
    square = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    for weights in (False, True):
        options = {"attn_mask": square, "is_causal": True, "need_weights": weights}
        for given in (x, x[0]):
            wanted = module(given, given, given, **options)
            got = multi_head_attention(module, given, given, given, **options)
            for one, other in zip(got, wanted, strict=True):
                assert (one is None) == (other is None)
                assert one is None or relative_error([one], [other]) <= TOLERANCE


def to_itself(m, x, **options):
    x = m.inner(x)
    return m.outer(x + m.attention(x, x, x, **options)[0])


def to_another(m, x, other, **options):
    return m.outer(m.attention(m.inner(x), m.keys(other), m.values(other), **options)[0])


def layers(**options) -> dict[str, nn.Module]:
    made = attention(**options)
    torch.manual_seed(0)
    return {
        "inner": nn.Linear(3, EMBED), "keys": nn.Linear(3, made.kdim), "values": nn.Linear(3, made.vdim),
        "attention": made, "outer": nn.Linear(EMBED, 2),
    }  # fmt: skip


@pytest.mark.parametrize("weights", [False, True])
def test_heads_and_embedding_die(weights):
    made = layers()
    analysis = analysed(lambda m, x: to_itself(m, x, need_weights=weights), tokens(width=3).float(), **{
        name: layer.float() for name, layer in made.items()
    })  # fmt: skip
    heads = classes(analysis.channel_map, "attention.out_proj.weight", 1)
    assert len(set(heads)) == HEADS
    assert classes(analysis.channel_map, "attention.in_proj_weight", 0) == 3 * heads
    embedding = classes(analysis.channel_map, "outer.weight", 1)
    assert classes(analysis.channel_map, "attention.in_proj_weight", 1) == embedding
    assert analysis.channel_map.size == HEADS + EMBED


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("forward", [to_itself, to_another])
def test_slim_attention_is_exact(form, forward):
    if forward is to_itself and form == "other widths":
        pytest.skip("queries are keys and values")
    model = Net(forward, **layers(**FORMS[form])).double().eval()
    inputs = [tokens(width=3), tokens(KEYS, 3, 1)][: 1 if forward is to_itself else 2]
    if not model.attention.batch_first:
        inputs = [one.transpose(0, 1) for one in inputs]
    for weights in (False, True):
        assert_exact(model, tuple(inputs), {"need_weights": weights})


class Pooling(nn.Module):
    """Radford et al., "Learning Transferable Visual Models From Natural Language Supervision": the pooling of CLIP."""

    def __init__(self, function, in_proj_weight):
        super().__init__()
        self.function, self.num_heads, self.in_proj_weight = function, HEADS, in_proj_weight
        self.stem, self.outer = nn.Conv2d(3, EMBED, 1), nn.Linear(EMBED, 3)
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(EMBED, EMBED) for _ in range(4))
        self.positional_embedding = nn.Parameter(torch.randn(10, EMBED))

    def forward(self, x):
        x = self.stem(x).flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None, :]
        x, _ = self.function(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=self.num_heads,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
            in_proj_weight=self.in_proj_weight,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0, out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias, use_separate_proj_weight=True, training=self.training, need_weights=False,
        )  # fmt: skip
        return self.outer(x.squeeze(0))


@pytest.mark.parametrize("unused", [None, torch.empty(0)], ids=["no kernel", "empty kernel"])
def test_attention_as_a_function_loses_heads_and_embedding(unused):
    """With weights of queries, keys and values apart; WavLM passes an empty kernel besides."""
    torch.manual_seed(0)
    model, images = Pooling(F.multi_head_attention_forward, unused).double().eval(), torch.rand(2, 3, 3, 3).double()
    written_out = copy.deepcopy(model)
    written_out.function = multi_head_attention_forward
    assert relative_error([written_out(images)], [model(images)]) <= TOLERANCE
    slimmed = assert_exact(model, (images,))
    assert slimmed.analysis.channel_map.size == HEADS + 2 * EMBED


class Translator(nn.Module):
    """An encoder and a decoder of torch's layers, with padding and a causal mask."""

    def __init__(self, norm_first: bool):
        super().__init__()
        options = {"dim_feedforward": 24, "batch_first": True, "norm_first": norm_first, "dropout": 0.0}
        self.source, self.target = nn.Linear(3, EMBED), nn.Linear(3, EMBED)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(EMBED, HEADS, **options), 2, enable_nested_tensor=not norm_first
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(EMBED, HEADS, **options), 2)
        self.head = nn.Linear(EMBED, 5)

    def forward(self, source, target):
        read = self.encoder(self.source(source))
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        return self.head(self.decoder(self.target(target), read, tgt_mask=mask, tgt_is_causal=True))


@pytest.mark.slow
@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_transformer_layers_slim_to_what_they_were_gated(norm_first):
    """Without gradients too, where torch would run a layer as one fused kernel."""
    torch.manual_seed(0)
    inputs = (tokens(width=3), tokens(KEYS, 3, 1))
    model = autogate.prepare(Translator(norm_first).double().eval(), inputs, flops=1.0)
    assert autogate.summary(model).reach == 1.0
    kill(model, 0.5)
    with_gradients = model.eval()(*inputs)
    gated = run_eval(model, inputs)
    assert relative_error(gated, [with_gradients]) <= TOLERANCE
    slim = autogate.finalize(model, warn=False)
    assert relative_error(run_eval(slim, inputs), gated) <= TOLERANCE
    assert relative_error([slim.eval()(*inputs)], gated) <= TOLERANCE
    layer = slim.encoder.layers[0]
    assert layer.self_attn.num_heads < HEADS
    assert layer.self_attn.embed_dim == layer.norm1.normalized_shape[0] < EMBED
    again = autogate.prepare(slim, inputs, flops=1.0)
    kill(again, 0.5, 1)
    gated = run_eval(again, inputs)
    assert relative_error(run_eval(autogate.finalize(again, warn=False), inputs), gated) <= TOLERANCE
