"""Federation: against pooled and local models, and where sites differ."""

from fedgex.simulations.evaluation.federation.comparison import run

__all__ = ["run"]
