"""Hugging Face's language models, tiny from their configurations: reach, exactness and generated tokens.

    python -m benchmarks.huggingface [MODEL ...]

Each model is prepared as it comes (with its cache) on tokens without a mask and with one, a fifth of its gates is
closed, and it is finalized. The slim model is compared with the gated one on other numbers of samples and tokens, with
a mask and without; tokens are generated with the cache and without. Prints a row of a table for each model.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import torch
import transformers
from torch import nn

import autogate
import rewriters

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SHARED = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_local_experts": 4}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "Llama": ("LlamaForCausalLM", _SHARED),
    "Qwen2": ("Qwen2ForCausalLM", _SHARED),
    "Qwen3": ("Qwen3ForCausalLM", {**_SHARED, "head_dim": 8}),
    "Mistral": ("MistralForCausalLM", _SHARED),
    "Gemma 2": ("Gemma2ForCausalLM", {**_SHARED, "head_dim": 8}),
    "Gemma 3": ("Gemma3ForCausalLM", {**_SHARED, "head_dim": 8}),
    "Phi-3": ("Phi3ForCausalLM", _SHARED),
    "OPT": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {}),
    "Falcon": ("FalconForCausalLM", {}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**_SHARED, **_EXPERTS, "head_dim": 8}),
    "BERT": ("BertForMaskedLM", {}),
    "ModernBERT": ("ModernBertForMaskedLM", {}),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A tiny model with random weights, in eval mode."""
    kind, options = MODELS[name]
    model_class: Any = getattr(transformers, kind)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**_SIZES, **options)).eval()


def calls() -> list[dict[str, Any]]:
    """The two example inputs, and calls with other numbers of samples and tokens."""
    tokens = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    twice = {"input_ids": tokens.repeat(1, 2), "attention_mask": mask.repeat_interleave(2, 1)}
    alone = [{"input_ids": tokens}, {"input_ids": tokens, "attention_mask": mask}]
    return [*alone, {"input_ids": tokens[:1, :4]}, {"input_ids": tokens.repeat(2, 2)}, twice]


def slim_and_gated(model: nn.Module) -> tuple[nn.Module, nn.Module, float]:
    """The slim model, the gated one, and the share of FLOPs that gates reach."""
    model = autogate.prepare(model, autogate.Examples(*calls()[:2]), flops=0.9)
    bank, reach = autogate.gates(model), autogate.summary(model).reach
    with torch.no_grad():
        bank.alpha[::5] = 0
    bank.fold()
    gated = copy.deepcopy(model)
    return autogate.finalize(model, warn=False), gated, reach


@torch.no_grad()
def largest_error(slim: nn.Module, gated: nn.Module) -> float:
    """The largest relative difference between their logits."""
    pairs = [[[model(**call).logits] for model in (slim, gated)] for call in calls()]
    return max(rewriters.relative_error(*pair) for pair in pairs)


@torch.no_grad()
def same_tokens(slim: Any, gated: Any) -> bool:
    """Whether both generate the same tokens, with the cache and without."""
    options = {"max_new_tokens": 5, "do_sample": False}
    given = calls()[0]["input_ids"]
    wanted = gated.generate(given, use_cache=True, **options)
    return all(torch.equal(slim.generate(given, use_cache=cache, **options), wanted) for cache in (True, False))


def row(name: str) -> str:
    """A row of the table, with the error in place of figures where there is one."""
    try:
        slim, gated, reach = slim_and_gated(build(name))
        tokens = "-" if "Masked" in MODELS[name][0] else "same" if same_tokens(slim, gated) else "others"
        return f"| {name} | {reach:.0%} | {largest_error(slim, gated):.0e} | {tokens} |"
    except Exception as error:  # what any model may raise; the table says so
        return f"| {name} | {type(error).__name__}: {str(error)[:120]} | | |"


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    print("## Hugging Face's language models\n\nWritten by `python -m benchmarks.huggingface`, see there.\n")
    print("| model | reach | largest error | generated tokens |\n|---|---|---|---|")
    for name in parser.parse_args().models:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
