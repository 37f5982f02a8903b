"""Numbers in the code that decide what a trained model predicts.

A checkpoint's manifest holds them, so that the hash of a released model covers them. A
release of fedgex with other numbers refuses the model: it would predict otherwise.
"""

from __future__ import annotations

LEAST_LOG_WEIGHT = -20.0
"""Lower bound of the log responsibilities in the network's input."""

TYPE_NOISE = 0.5
"""Share of the noise in `factor_model.evidence`: restoration of unseen patients wants
more noise than classification. Chosen by cross-validation over training institutions.
"""

GATE_LOW, GATE_HIGH = 0.4, 0.8
"""Gap between measured and restored genes, in SDs, at which the gate opens and is
fully open. On validation institutions 98 of 100 patients with cells missing at random
or by panel are below .5 at all rates, those with low expression missing above .7."""

GATED_OUTPUT_SCALE = 4.0
"""Scale of the gated output; acts as a learning-rate multiplier."""

LEAST_LOADING_SCALE = 1e-9
"""Least loading scale that divides; factors that the data do not support have 0."""

NEVER = -1e6
"""Log share of a type without patients."""

OWN_SHARE, CLINICAL_SHARE = 0.6, 0.2
"""Scale of a type's own weights over the shared ones: of expression, of age and sex.
Chosen by cross-validation over training institutions (docs/decisions/0006)."""

BASELINE_SCALE = 3.0
"""Scale of the baseline's logits; a learning-rate multiplier over the weights."""

VARIANCE_SHARE = 0.85
"""Mean squared error of unseen patients over the variance that the factor model
predicts: .82 to .88 for .1 to .95 missing, by cross-validation over training
institutions (decision 6)."""


def deciding() -> dict[str, float]:
    """Return the numbers of this module by name."""
    return {name: value for name, value in globals().items() if name.isupper()}
