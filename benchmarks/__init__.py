"""Benchmarks of the guard's cost, as ratios measured side by side in one run: ``make bench``."""
