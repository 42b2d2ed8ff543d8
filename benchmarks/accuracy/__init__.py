"""Accuracy at equal FLOPs and equal epochs, compared with other methods: `python -m benchmarks.accuracy --help`."""
