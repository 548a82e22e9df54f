"""The benchmark as a protocol: fit, evaluate, measure, record, tabulate, track, seed."""
