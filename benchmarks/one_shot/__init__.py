"""What a criterion is worth without any training: `python -m benchmarks.one_shot --help`."""
