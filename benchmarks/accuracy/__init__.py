"""Accuracy at equal FLOPs and equal epochs, side by side with other methods: `python -m benchmarks.accuracy --help`."""
