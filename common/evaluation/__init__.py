"""Baselines and metrics."""
