"""Survival: predictions of every method, their evaluation, and the tables."""

from fedgex.simulations.evaluation.survival.comparison import run

__all__ = ["run"]
