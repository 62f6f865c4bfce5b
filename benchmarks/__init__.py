"""Measure training of mixtures of experts beside what else a user could take; `python -m benchmarks.run`."""
