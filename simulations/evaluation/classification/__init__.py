"""Classification of the cancer type from few genes."""

from fedgex.simulations.evaluation.classification.comparison import run

__all__ = ["run"]
