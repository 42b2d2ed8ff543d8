"""A tiny model from every file of timm that no other test covers is slimmed exactly."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

import autogate
import rewriters
from benchmarks.model_lists import listed
from benchmarks.parts import finalize_compared, kill, randomise_constants, randomise_norms
from tests.models.test_timm_models import NORMED, QUICK
from tests.slow import slow_but

ONCE = (1, 1, 1, 1)
DIMS = (16, 24, 32, 40)
FOUR_STAGES: dict[str, Any] = {"depths": ONCE, "dims": DIMS}
SMALL_VIT: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}

FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (32, SMALL_VIT),
    "botnet26t_256": (64, {"img_size": 64}),
    "lambda_resnet26t": (64, {}),
    "cait_xxs24_224": (32, {"img_size": 32, "depth": 1, "embed_dim": 24}),
    "coat_lite_tiny": (32, {"img_size": 32, "embed_dims": DIMS, "serial_depths": ONCE}),
    "convit_tiny": (32, {"img_size": 32, "depth": 2, "embed_dim": 24, "local_up_to_layer": 1}),
    "convmixer_768_32": (32, {}),
    "cpubone_nano": (64, {"width_list": [8, 16, 24, 32, 40], "depth_list": [0, 1, 1, 1, 1], "head_widths": (48, 56)}),
    "crossvit_tiny_240": (
        48, {"img_size": 48, "img_scale": (1.0, 0.5), "embed_dim": (24, 48), "depth": ((1, 1, 0),), "num_heads": (3, 3)}
    ),
    "csatv2": (64, {"dims": (24, 48, 96, 128), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)}),
    "cspnext_tiny": (64, {"deepen_factor": 0.167, "widen_factor": 0.25}),
    "davit_tiny": (64, {"depths": ONCE, "embed_dims": DIMS, "num_heads": (2, 2, 2, 2)}),
    "deepseek_vit_412m": (56, {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    "edgenext_xx_small": (64, {"dims": DIMS, "depths": (2, 2, 2, 2)}),
    "efficientformer_l1": (224, {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 24, 32)}),
    "efficientformerv2_s0": (64, {"img_size": 64, "depths": (1, 1, 2, 2), "embed_dims": (8, 16, 24, 32)}),
    "efficientvim_m1": (64, {"embed_dim": (16, 24, 32), "depths": (1, 1, 1), "state_dim": (9, 9, 9)}),
    "efficientvit_b0": (64, {"widths": (8, 16, 16, 32, 32), "depths": (1, 1, 1, 1, 1)}),
    "efficientvit_m0": (64, {"img_size": 64, "embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 2, 2)}),
    "fastvit_t8": (64, {"layers": ONCE, "embed_dims": (16, 32, 64, 128)}),
    "focalnet_tiny_srf": (32, {}),
    "gcvit_xxtiny": (64, {"img_size": 64}),
    "gemma4_vit_167m": (
        48, {**SMALL_VIT, "img_size": 48, "head_dim": 8, "intermediate_size": 48, "position_embedding_size": 16}
    ),
    "hardcorenas_a": (64, {}),
    "hiera_tiny_224": (64, {"img_size": 64, "stages": ONCE, "embed_dim": 16}),
    "sam2_hiera_tiny": (64, {"stages": (1, 2, 2, 1), "embed_dim": 16, "global_att_blocks": (4,)}),
    "iformer_t": (64, {"dims": (8, 16, 32, 64), "depths": (1, 1, 3, 3), "attn_groups": (0, 0, 1, 1)}),
    "inception_next_atto": (64, FOUR_STAGES),
    "inception_resnet_v2": (96, {}),
    "inception_v4": (96, {}),
    "lcnetv2_small": (64, {}),
    "levit_128s": (
        128, {"img_size": 128, "embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 3, 4), "key_dim": 8}
    ),
    "lowformer_b0": (64, {"width_list": [8, 16, 24, 32, 40], "depth_list": [0, 1, 1, 1, 1], "head_widths": (48, 56)}),
    "maxvit_pico_rw_256": (64, {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 32), "stem_width": 16}),
    "poolformerv2_s12": (32, {}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "mobilenetv5_base": (64, {"channel_multiplier": 0.125}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "naflexvit_base_patch16_gap": (64, {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "nasnetalarge": (96, {"stem_size": 8, "num_features": 192}),
    "nest_tiny": (32, {"img_size": 32}),
    "nextvit_small": (64, {"depths": (1, 1, 5, 1), "stem_chs": (16, 8, 16)}),
    "test_nfnet": (96, {}),
    "pit_ti_224": (64, {"img_size": 64, "depth": (1, 1, 1), "base_dims": (8, 8, 8), "heads": (2, 4, 8)}),
    "pvt_v2_b0": (64, {"depths": ONCE, "embed_dims": DIMS, "num_heads": (1, 2, 2, 2)}),
    "qwen3_vit_88m": (64, {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    "rdnet_tiny": (64, {"num_blocks_list": (1,) * 7, "growth_rates": (16,) * 7, "num_init_features": 16}),
    "repghostnet_050": (64, {}),
    "repvit_m0_9": (64, {"embed_dim": DIMS, "depth": ONCE}),
    "resnetv2_18": (64, {}),
    "legacy_seresnet18": (64, {}),
    "sequencer2d_s": (32, {"img_size": 32, "layers": ONCE, "embed_dims": DIMS, "hidden_sizes": (8, 8, 8, 8)}),
    "shvit_s1": (64, {"embed_dim": (32, 48, 64), "partial_dim": (8, 12, 16), "depth": (1, 1, 1)}),
    "starnet_s050": (64, {"depths": ONCE}),
    "swiftformer_xs": (64, {"layers": ONCE, "embed_dims": DIMS}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "depths": (1, 2), "num_heads": (2, 4), "embed_dim": 16}),
    "swinv2_cr_tiny_224": (64, {"img_size": 64, "depths": (1, 2), "num_heads": (2, 4), "embed_dim": 16}),
    "tiny_vit_5m_224": (
        64, {"depths": ONCE, "embed_dims": DIMS, "num_heads": (2, 2, 2, 2), "window_sizes": (4, 4, 4, 2)}
    ),
    "tnt_s_legacy_patch16_224": (
        32, {"img_size": 32, "depth": 2, "embed_dim": 96, "inner_dim": 24, "num_heads_outer": 3, "num_heads_inner": 2}
    ),
    "twins_svt_small": (
        64, {"img_size": 64, "depths": ONCE, "embed_dims": (16, 32, 64, 128), "num_heads": (2, 4, 8, 16)}
    ),
    "vgg11_bn": (32, {"mlp_ratio": 0.05}),
    "visformer_tiny": (64, {"img_size": 64, "depth": (1, 1, 1), "embed_dim": 48, "init_channels": 8, "num_heads": 3}),
    "vit_tiny_r_s16_p8_224": (64, {"img_size": 64, "depth": 1, "embed_dim": 24}),
    "samvit_base_patch16": (
        64, {"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 3, "global_attn_indexes": (1,)}
    ),
    "vitamin_small_224": (64, {"img_size": 64, "depth": 1}),
    "volo_d1_224": (64, {"img_size": 64}),
    "legacy_xception": (96, {}),
    "xception41": (64, {}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}),
}  # fmt: skip
"""By name: the side of the images, and the arguments that make the model small."""

QUICKEST = (
    "beit_base_patch16_224", "cspnext_tiny", "efficientvim_m1", "inception_next_atto", "pit_ti_224", "qwen3_vit_88m",
    "legacy_seresnet18", "starnet_s050", "vit_tiny_r_s16_p8_224",
)  # fmt: skip
"""Those that run by default."""

IN_THE_BENCHMARK = {"pnasnet"}
"""Files none of whose models can be built small."""

NORMS_IN_FLOAT32 = ("deepseek_vit_412m",)
"""They are computed so whatever the model's type: it is tried in float32."""


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    side, options = FAMILIES[name]
    model = timm.create_model(name, num_classes=10, **options)
    randomise_norms(model)
    randomise_constants(model)
    dtype = torch.float32 if name in NORMS_IN_FLOAT32 else torch.float64
    return model.to(dtype), torch.randn(2, 3, side, side, dtype=dtype)


@pytest.mark.parametrize("name", slow_but(QUICKEST, FAMILIES))
def test_outputs_are_the_gated_model_s(name):
    model, example = build(name)
    wanted = rewriters.run_eval(model, (example,))
    model = autogate.prepare(model, example, flops=0.9)
    assert all(map(torch.equal, rewriters.run_eval(model, (example,)), wanted))
    assert autogate.summary(model).reach >= 0.9
    kill(model, 0.3)
    assert (autogate.gates(model).alpha == 0).any()
    more = torch.cat([example, example[:1]])  # rewritten forwards are for batches of any size
    tolerance = 1e-5 if example.dtype == torch.float32 else 1e-10
    assert finalize_compared(model, ((example,), {}), ((more,), {})) <= tolerance


def test_every_file_has_a_model():
    family = {one.name: one.family for one in listed() if not one.name.startswith("torchvision:")}
    tested = {family[name] for name in (*FAMILIES, *QUICK, *NORMED)}
    assert set(family.values()) - tested == IN_THE_BENCHMARK
