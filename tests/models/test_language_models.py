"""Hugging Face's language models with their cache: masks absent and present, other lengths, generated tokens."""

import pytest

pytest.importorskip("transformers")

from benchmarks.huggingface import build, largest_error, same_tokens, slim_and_gated

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-NeoX", "Falcon"])
def test_a_slim_language_model_generates_the_same_tokens(name):
    slim, gated, reach = slim_and_gated(build(name))
    assert reach == 1 and largest_error(slim, gated) <= 1e-5
    assert same_tokens(slim, gated)
