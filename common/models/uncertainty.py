"""Predictive standard deviation of each restored value.

    x = mean_k + loadings z + noise    (in cancer type k, see
    common/models/factor_model.py)
    -> given the measured genes: P(k), and z ~ N(z_k, A_k^-1) within k
    -> standard deviation of each missing gene about its restored value

The network moves the restored value, not its standard deviation. A calibration factor
from the sites' own hidden cells would make the intervals too narrow, since the model
was trained on these patients; `VARIANCE_SHARE` is from institutions left out.

B patients, V genes, K components, R factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgex.common.errors import ConfigError
from fedgex.common.models.factor_model import MixtureOfFactorAnalyzers
from fedgex.common.models.gexbert import GexBert
from fedgex.common.models.restoration import restore

VARIANCE_SHARE = 0.85
"""Mean squared error of unseen patients over the variance that the factor model
predicts: .82 to .88 for .1 to .95 missing, by cross-validation over training
institutions (decision 6)."""


@torch.no_grad()
def restore_with_uncertainty(
    backbone: GexBert, values: Tensor, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Restore missing cells, each with its predictive standard deviation.

    By the laws of total expectation and variance over the components k, with
    responsibilities r_k, m_k = mean_k + w' z_k and m = sum_k r_k m_k for the gene's
    loadings w,

        Var(x | measured) = s (noise + w' (sum_k r_k A_k^-1) w + sum_k r_k (m_k - m)^2),

    where s is `VARIANCE_SHARE`.

    Parameters
    ----------
    values
        Standardised expression, shape (B, V); NaN where missing.
    batch_size
        Patients at a time; each takes K R^2 numbers.

    Returns
    -------
    mean : Tensor
        Shape (B, V): as given where measured, else restored by the backbone.
    sd : Tensor
        Shape (B, V): 0 where measured.

    Raises
    ------
    ConfigError
        If the backbone has no factor model.
    """
    linear = backbone.encoder.linear
    if linear is None:
        raise ConfigError(
            "the model has no factor model, from which uncertainty is computed; "
            "expected a study with linear_rank above 0."
        )
    backbone.eval()
    means, sds = [], []
    for rows in values.split(batch_size):
        missing = rows.isnan()
        restored = restore(backbone, rows, ~missing, missing)
        means.append(torch.where(missing, restored, rows))
        sds.append(torch.where(missing, _variance(linear, rows).sqrt(), 0.0))
    return torch.cat(means), torch.cat(sds)


def _variance(linear: MixtureOfFactorAnalyzers, values: Tensor) -> Tensor:
    """Return the variance of each gene given the measured ones, shape (B, V)."""
    w = linear.loadings  # (V, R)
    measured = ~values.isnan()
    precise = measured / linear.noise  # (B, V)
    gram = torch.einsum("vr,bv,vs->brs", w, precise, w)  # (B, R, R)
    off = values.nan_to_num(0.0).unsqueeze(1) - linear.means  # (B, K, V)
    weighted = off * precise.unsqueeze(1)
    target = weighted @ w  # (B, K, R)
    root, _ = torch.linalg.cholesky_ex(gram.unsqueeze(1) + linear.precisions)
    factors = torch.cholesky_solve(target.unsqueeze(-1), root).squeeze(-1)  # (B, K, R)
    distance = (off * weighted).sum(-1) - (target * factors).sum(-1)  # (B, K)
    prior = torch.linalg.cholesky_ex(linear.precisions)[0]
    log_joint = linear.log_shares - distance / 2
    log_joint = log_joint + _half_log_det(prior) - _half_log_det(root)
    weights = log_joint.softmax(-1)  # (B, K)
    inverses = torch.cholesky_inverse(root)  # (B, K, R, R)
    within = torch.einsum("bk,bkrs->brs", weights, inverses)
    of_factors = ((w @ within) * w).sum(-1)  # (B, V)
    means = linear.means + factors @ w.T  # (B, K, V)
    mean = torch.einsum("bk,bkv->bv", weights, means)
    between = (weights.unsqueeze(-1) * (means - mean.unsqueeze(1)).square()).sum(1)
    return VARIANCE_SHARE * (linear.noise + of_factors + between)


def _half_log_det(root: Tensor) -> Tensor:
    """Return half the log determinant of L L', from L of shape (..., R, R)."""
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
