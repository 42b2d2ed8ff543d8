"""timm's models are slimmed exactly at random patterns of dead channels."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torchvision.models import googlenet

import autogate
import rewriters
from autogate.slim.history import ATTRIBUTE
from benchmarks.exactness import fvcore_flops
from benchmarks.parts import LEAST_SPREAD, kill, randomise_norms, settle_norms, spread
from tests.slow import slow_but

QUICK = {
    "resnet18": 64, "resnext50_32x4d": 64, "seresnet50": 64, "resnest14d": 64, "skresnet18": 64, "mobilenetv1_100": 64,
    "mobilenetv2_100": 64, "mobilenetv3_small_100": 64, "efficientnet_b0": 64, "tf_efficientnetv2_b0": 64,
    "mixnet_s": 64, "densenet121": 64, "dla34": 64, "dla60_res2next": 64, "dpn68": 64, "res2net50_26w_4s": 64,
    "cspresnet50": 64, "ese_vovnet19b_dw": 64, "hrnet_w18_small": 64, "inception_v3": 96, "regnety_002": 64,
    "repvgg_a0": 64, "ghostnet_100": 64, "rexnet_100": 64, "selecsls42": 64, "tresnet_m": 64, "fasternet_t0": 64,
    "mobileone_s0": 64, "lcnet_050": 64, "hgnet_tiny": 64,
}  # fmt: skip
"""The quicker ones of `benchmarks/exactness.py`, with the side of the images they are tried on."""

QUICKEST = ("mobilenetv3_small_100", "ese_vovnet19b_dw", "regnety_002", "fasternet_t0")
"""Those that run by default: excitation, concatenation, groups, a split."""


def build(name: str, **options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    randomise_norms(model)
    size = QUICK.get(name, 64)
    return model, torch.randn(2, 3, size, size)


def gated_outputs(model: nn.Module, example: torch.Tensor) -> torch.Tensor:
    """Of a model some of whose channels are dead, its norms settled: they tell a wrong network from a right one."""
    settle_norms(model, ((example,), {}))
    gated = outputs(model, example)
    assert spread([gated]) > LEAST_SPREAD
    return gated


@torch.no_grad()
def outputs(model: nn.Module, example: torch.Tensor) -> torch.Tensor:
    return model.eval()(example)


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return rewriters.relative_error([got], [wanted])


@pytest.mark.parametrize("name", slow_but(QUICKEST, QUICK))
def test_slim_outputs_and_flops_are_the_gated_models(name):
    """In float64: of some of these float32 alone rounds by more than 1e-5."""
    model, example = build(name)
    model, example = model.double(), example.double()
    dense_flops = fvcore_flops(model, example)
    wanted = outputs(model, example)
    model = autogate.prepare(model, example)
    assert torch.equal(outputs(model, example), wanted)

    whole = autogate.summary(model)
    assert whole.reach >= 0.9
    assert whole.all_flops == pytest.approx(dense_flops, rel=1e-9)

    kill(model, (0.1, 0.4, 0.8)[list(QUICK).index(name) % 3])
    gated, left = gated_outputs(model, example), autogate.summary(model).flops
    slim = autogate.finalize(model, warn=False)
    assert slim is model
    assert difference(outputs(slim, example), gated) <= 1e-10
    assert fvcore_flops(slim, example) == pytest.approx(left, rel=1e-9)
    slim.train()(example)


def test_outputs_in_train_mode_are_unchanged_by_prepare():
    model, example = build("mobilenetv3_small_100", drop_rate=0.2, drop_path_rate=0.2)
    copied = copy.deepcopy(model)
    autogate.prepare(model, example)
    torch.manual_seed(1)
    wanted = copied.train()(example)
    torch.manual_seed(1)
    assert torch.equal(model.train()(example), wanted)


def test_class_paths_methods_and_hooks_survive():
    model, example = build("cspresnet50")
    paths = [path for path, _ in model.named_modules()]
    types = [type(module) for module in model.modules()]
    seen = []
    model.stages[1].register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    model = autogate.prepare(model, example)
    assert torch.equal(model.forward_features(example), model.forward_features(example))
    kill(model, 0.4)
    gated = gated_outputs(model, example)
    slim = autogate.finalize(model, warn=False)
    assert [path for path, _ in slim.named_modules()] == paths
    assert [type(module) for module in slim.modules()] == types
    seen.clear()
    assert difference(slim.forward_head(slim.forward_features(example)), gated) <= 1e-5
    assert len(seen) == 1


def test_no_trace_of_gates_is_left():
    model, example = build("resnet18")
    plain = build("resnet18")[0]
    model = autogate.prepare(model, example)
    kill(model, 0.4)
    slim = autogate.finalize(model, warn=False)
    assert type(slim.conv1) is nn.Conv2d
    assert list(slim.state_dict()) == list(plain.state_dict())
    for module, before in zip(slim.modules(), plain.modules(), strict=True):
        kept = {ATTRIBUTE} if module is slim else set()  # what it remembers of this, for autogate.save
        assert module.__dict__.keys() - kept == before.__dict__.keys()
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert slim.layer1[0].conv1.out_channels == slim.layer1[0].bn1.num_features == slim.layer1[0].conv2.in_channels


@pytest.mark.slow
def test_heads_that_exist_in_train_mode_only_are_cut_along():
    torch.manual_seed(0)
    model, example = googlenet(aux_logits=True, init_weights=False), torch.randn(2, 3, 96, 96)
    randomise_norms(model)
    model = autogate.prepare(model, example)
    kill(model, 0.4)
    gated = gated_outputs(model, example)
    slim = autogate.finalize(model, warn=False)
    assert difference(outputs(slim, example), gated) <= 1e-5
    logits, _, auxiliary = slim.train()(example)
    assert logits.shape == auxiliary.shape == (2, 1000)
    assert slim.aux1.conv.conv.in_channels < 512


def test_a_block_whose_inner_channels_all_die_is_taken_out():
    model, example = build("resnet50", layers=(1, 2, 1, 1))
    model = autogate.prepare(model, example)
    bank = autogate.gates(model)
    inner = bank.channel_map.classes[("layer2.1.conv3.weight", 1)]
    with torch.no_grad():
        bank.alpha[inner] = 0
    gated = gated_outputs(model, example)
    slim = autogate.finalize(model, warn=False)
    assert difference(outputs(slim, example), gated) <= 1e-5
    assert not list(slim.layer2[1].parameters())
    assert slim.layer2[1].branch_constant_0.shape == (1, 512, 1, 1)
    assert slim(torch.randn(3, 3, 96, 96)).shape == (3, 1000)


def test_everything_dead_leaves_a_network_that_runs():
    model, example = build("mobilenetv3_small_100")
    model = autogate.prepare(model, example)
    with torch.no_grad():
        autogate.gates(model).alpha.zero_()
    gated = outputs(model, example)
    slim = autogate.finalize(model, warn=False)
    assert difference(outputs(slim, example), gated) <= 1e-5
    assert all(0 not in parameter.shape for parameter in slim.parameters())


def test_slim_models_copy_pickle_and_run_at_other_resolutions():
    model, example = build("res2net50_26w_4s", layers=(1, 1, 1, 1))
    model = autogate.prepare(model, example)
    kill(model, 0.5)
    slim = autogate.finalize(model, warn=False)
    other = torch.randn(3, 3, 96, 128)
    for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(outputs(twin, other), outputs(slim, other))


def test_a_slim_model_can_be_slimmed_again():
    model, example = build("fasternet_t0")
    for seed in (0, 1):
        model = autogate.prepare(model, example)
        kill(model, 0.4, seed)
        gated = gated_outputs(model, example)
        model = autogate.finalize(model, warn=False)
        assert difference(outputs(model, example), gated) <= 1e-5


def test_classifier_can_be_reset_after_slimming():
    model, example = build("resnet18")
    model = autogate.prepare(model, example)
    kill(model, 0.4)
    slim = autogate.finalize(model, warn=False)
    slim.reset_classifier(7)
    assert outputs(slim, example).shape == (2, 7)


def test_float64_is_exact_to_its_own_rounding():
    model, example = build("resnest14d")
    model, example = model.double(), example.double()
    model = autogate.prepare(model, example)
    kill(model, 0.4)
    gated = gated_outputs(model, example)
    assert difference(outputs(autogate.finalize(model, warn=False), example), gated) <= 1e-12


NORMED = {
    "test_convnext": {}, "test_vit": {}, "test_mambaout": {},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40), "img_size": 64},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40), "conv_mlp": True, "img_size": 64},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "img_size": 64},
    "vit_tiny_patch16_224": {"depth": 2, "norm_layer": "rmsnorm", "img_size": 64},
    "swin_tiny_patch4_window7_224": {"depths": (1, 2), "num_heads": (2, 4), "embed_dim": 32, "img_size": 56},
    "vit_relpos_small_patch16_224": {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 64},
    "vit_small_patch16_rope_224": {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 64},
    "vit_small_patch16_dinov3": {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 64},
    "resnet26": {"norm_layer": "groupnorm", "layers": (1, 1, 1, 1), "img_size": 64},
}  # fmt: skip
"""Small models whose norms look across channels, with the options that make them small."""

NORMED_QUICK = ("test_convnext", "convnextv2_atto", "vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "resnet26")
"""Those that run by default: LayerNorm, GRN, RMSNorm, attention with relative positions, GroupNorm."""

HEADS_DIE = ("vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "vit_small_patch16_rope_224",
             "vit_small_patch16_dinov3")  # fmt: skip


def build_normed(name: str, img_size: int = 64, **options) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    takes_size = name.startswith(("vit", "deit", "swin"))
    size = {"img_size": img_size} if takes_size else {}
    model = timm.create_model(name, num_classes=10, **size, **options)
    randomise_norms(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) / 2)
            elif parameter.ndim == 2:
                parameter.mul_(4)  # or biases are most of what comes out
    side = model.pretrained_cfg["input_size"][-1] if name.startswith("test_") else img_size
    return model, torch.randn(2, 3, side, side)


@pytest.mark.parametrize("name", slow_but(NORMED_QUICK, NORMED))
def test_embeddings_shrink_exactly(name):
    index = list(NORMED).index(name)
    model, example = build_normed(name, **NORMED[name])
    wanted = outputs(model, example)
    model = autogate.prepare(model, example, flops=0.9)
    assert torch.equal(outputs(model, example), wanted)
    assert autogate.summary(model).reach >= 0.9
    assert autogate.gates(model).channel_map.statistics
    kill(model, (0.3, 0.5, 0.7)[index % 3], index)
    gated = gated_outputs(model, example)
    slim = autogate.finalize(model, warn=False)
    assert difference(outputs(slim, example), gated) <= 1e-5
    norms = [module for module in slim.modules() if "Norm" in type(module).__name__]
    assert norms and all("forward" not in module.__dict__ for module in norms)
    slim.train()(example)


@pytest.mark.parametrize("name", slow_but(HEADS_DIE[:1], HEADS_DIE))
def test_a_head_s_channels_are_one_class(name):
    model, example = build_normed(name, **NORMED[name])
    classes = autogate.gates(autogate.prepare(model, example)).channel_map.classes[("blocks.0.attn.proj.weight", 1)]
    heads = classes.view(3, -1)
    assert len(heads[:, 0].unique()) == 3
    assert (heads >= 0).all() and (heads == heads[:, :1]).all()


def test_a_convnext_with_embeddings_that_stay():
    model, example = build_normed("test_convnext")
    model = autogate.prepare(model, example, embed=False, flops=0.9)
    assert not autogate.gates(model).channel_map.statistics
    kill(model, 0.5)
    gated, width = gated_outputs(model, example), model.num_features
    slim = autogate.finalize(model, warn=False)
    assert difference(outputs(slim, example), gated) <= 1e-5
    assert slim.num_features == slim.get_classifier().in_features == width
