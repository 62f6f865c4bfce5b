"""Kernels: what every token of every step goes through, written to be fast."""
