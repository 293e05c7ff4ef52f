"""Runnable experiments: `python -m experiments.NAME --out DIR`."""
