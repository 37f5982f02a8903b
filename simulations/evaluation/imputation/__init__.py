"""Imputation: error of restored expression, and coverage of the uncertainty."""

from fedgex.simulations.evaluation.imputation.comparison import run

__all__ = ["run"]
