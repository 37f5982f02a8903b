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

from fedgex.common.constants import VARIANCE_SHARE
from fedgex.common.errors import ConfigError
from fedgex.common.models.factor_model import MixtureOfFactorAnalyzers
from fedgex.common.models.gexbert import GexBert
from fedgex.common.models.restoration import restore


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


@torch.no_grad()
def unlikeness(
    linear: MixtureOfFactorAnalyzers, values: Tensor, batch_size: int = 32
) -> Tensor:
    """Return how far each sample lies from the training patients, shape (B,).

    Squared Mahalanobis distance of the measured genes from their mean under the most
    probable component k, divided by their number n:

        (x - mean_k)' (W C_k W' + noise)^-1 (x - mean_k) / n

    Its expectation under the model is 1 for any panel, so that one threshold serves
    all; unseen patients lie below, since the noise is raised for them. Lee et al. 2018
    (arXiv 1807.03888) detect foreign samples by the same distance, between features.

    Parameters
    ----------
    values
        Standardised expression, shape (B, V); NaN where missing. NaN comes back for a
        sample without a measured gene.
    """
    found = [_unlikeness(linear, rows) for rows in values.split(batch_size)]
    return torch.cat(found) if found else values.new_empty(0)


def _unlikeness(linear: MixtureOfFactorAnalyzers, values: Tensor) -> Tensor:
    known = _Known(linear, values)
    best = known.log_joint.argmax(dim=1, keepdim=True)
    distance = known.distance.gather(1, best).squeeze(1)
    return distance / (~values.isnan()).sum(dim=1)  # 0 / 0 is NaN


class _Known:
    """What the measured genes say of each component; shapes as in `_variance`."""

    def __init__(self, linear: MixtureOfFactorAnalyzers, values: Tensor) -> None:
        w = linear.loadings  # (V, R)
        precise = ~values.isnan() / linear.noise  # (B, V)
        gram = torch.einsum("vr,bv,vs->brs", w, precise, w)  # (B, R, R)
        off = values.nan_to_num(0.0).unsqueeze(1) - linear.means  # (B, K, V)
        weighted = off * precise.unsqueeze(1)
        target = weighted @ w  # (B, K, R)
        root, _ = torch.linalg.cholesky_ex(gram.unsqueeze(1) + linear.precisions)
        self.root = root
        self.factors = torch.cholesky_solve(target.unsqueeze(-1), root).squeeze(-1)
        distance = (off * weighted).sum(-1) - (target * self.factors).sum(-1)
        self.distance = distance  # (B, K)
        prior = torch.linalg.cholesky_ex(linear.precisions)[0]
        log_joint = linear.log_shares - distance / 2
        self.log_joint = log_joint + _half_log_det(prior) - _half_log_det(root)


def _variance(linear: MixtureOfFactorAnalyzers, values: Tensor) -> Tensor:
    """Return the variance of each gene given the measured ones, shape (B, V)."""
    w = linear.loadings  # (V, R)
    known = _Known(linear, values)
    weights, factors = known.log_joint.softmax(-1), known.factors  # (B, K), (B, K, R)
    inverses = torch.cholesky_inverse(known.root)  # (B, K, R, R)
    within = torch.einsum("bk,bkrs->brs", weights, inverses)
    of_factors = ((w @ within) * w).sum(-1)  # (B, V)
    means = linear.means + factors @ w.T  # (B, K, V)
    mean = torch.einsum("bk,bkv->bv", weights, means)
    between = (weights.unsqueeze(-1) * (means - mean.unsqueeze(1)).square()).sum(1)
    return VARIANCE_SHARE * (linear.noise + of_factors + between)


def _half_log_det(root: Tensor) -> Tensor:
    """Return half the log determinant of L L', from L of shape (..., R, R)."""
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
