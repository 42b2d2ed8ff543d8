"""Hugging Face's models, tiny from their configurations: reach, exactness and generated tokens."""
