"""A synthetic consortium with known truth, in the raw layout of a real one.

Letters: i patient, g gene, k programme (K of them), c cancer type, s institution.

A patient's programme scores are shifted by the cancer type,

    z_ik = mu_ck + N(0, 1),                     mu_ck ~ N(0, TYPE_SHIFT^2)

expression follows them linearly and through products of neighbouring programmes
(k, k+1), moves with the institution (batch effect), and bends at its floor, because
softplus(x) = ln(1 + e^x) is x for large x and never negative:

    y_ig = softplus(m_g + a_g . z_i + b_g . (z_i * roll(z_i)) + d_sg + N(0, NOISE^2))
    m_g ~ U(1, 10),    d_sg ~ N(0, SITE_SHIFT^2)

where each gene loads on GENE_PROGRAMMES programmes (a) and on one product (b). Values
are thus like log2(x + 1) of a normalised abundance x; none passes SATURATION. Survival
is Weibull, with a scale of its own for each cancer type, and only the programmes act on
the hazard:

    log hazard ratio_i = beta . (z_i - mu_c),   beta != 0 for half of the programmes
    T_i = lambda_c (-ln U(0, 1) / exp(log hazard ratio_i))^(1 / SHAPE)
    C_i ~ Exp(CENSORING_DAYS)                   duration = min(T, C), event = T <= C

Age and sex act on nothing. Institutions differ in size (log-normal), in their mixture
of cancer types (Dirichlet), in batch effect, and in the genes that they do not measure
(NaN); the hold-out institutions measure all genes.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedgex.common.errors import ConfigError

N_PROGRAMMES = 10
"""Gene programmes, K; even, so that half of them drive survival."""
GENE_PROGRAMMES = 3
"""Programmes on which each gene loads linearly."""
TYPE_SHIFT = 1.0
"""Standard deviation of the cancer types' programme shifts."""
SITE_SHIFT = 0.2
"""Standard deviation of the batch effect, per gene and institution."""
NOISE = 0.6
"""Standard deviation of what no programme explains."""
SATURATION = 25.0
"""No assay measures more, log2(x + 1); of millions of drawn values a few would be."""
UNMEASURED_SHARE = 0.1
"""Share of the genes that an institution does not measure."""
EFFECT = 1.0
"""Standard deviation of the log hazard ratio within a cancer type."""
SHAPE = 1.2
"""Weibull shape: the hazard rises slowly."""
SCALE_DAYS = (500.0, 2500.0)
"""Range of the cancer types' Weibull scales, days."""
CENSORING_DAYS = 2000.0
"""Mean time to censoring, days."""

logger = logging.getLogger(__name__)


def new_data(
    out: Path,
    *,
    seed: int = 1,
    n_sites: int = 8,
    n_holdouts: int = 2,
    patients_per_site: int = 80,
    n_genes: int = 300,
    n_cancer_types: int = 4,
) -> None:
    """Draw a consortium and write it to a new folder; the defaults fit `demo`.

    Writes `expression.parquet` (samples x genes), `clinical.csv` (patient, institution,
    duration in days, event, age, sex, cancer_type) and the truth, which no simulated
    hospital is shown: `truth/loadings.parquet` (genes x programmes, their products and
    the mean), `truth/patients.parquet` (programme scores and log hazard ratio) and
    `truth.json` (the arguments, programme effects and shifts, Weibull scales).

    A folder that holds the same consortium already is left as it is. Another
    institution leaves the patients of those before it as they are.

    Parameters
    ----------
    out
        Folder that is absent or empty.
    seed
        0 or more.
    n_sites, n_holdouts
        Institutions named "Hospital 01" and so on, and "Hold-out 01" and so on.
    patients_per_site
        Expected number of patients of an institution.
    n_genes
        Genes, named GENE0001 and so on.
    n_cancer_types
        Cancer types, named type-1 and so on.

    Raises
    ------
    ConfigError
        If an argument cannot be used, or if the folder holds anything else.
    """
    arguments = {
        "seed": seed,
        "n_sites": n_sites,
        "n_holdouts": n_holdouts,
        "patients_per_site": patients_per_site,
        "n_genes": n_genes,
        "n_cancer_types": n_cancer_types,
    }
    _refuse_unusable(arguments)
    if _holds(out, arguments):
        logger.info("%s holds this consortium already", out)
        return

    truth = _draw_truth(seed, n_genes, n_cancer_types)
    names = [f"Hospital {s:02d}" for s in range(1, n_sites + 1)]
    holdouts = [f"Hold-out {s:02d}" for s in range(1, n_holdouts + 1)]
    institutions = [
        _draw_institution(truth, seed, name, patients_per_site, name in holdouts)
        for name in names + holdouts
    ]
    expression, clinical, patients = (
        pd.concat(tables) for tables in zip(*institutions, strict=True)
    )

    out = out.resolve()
    partial = out.with_name(out.name + ".partial")
    (partial / "truth").mkdir(parents=True, exist_ok=True)
    expression.to_parquet(partial / "expression.parquet")
    clinical.to_csv(partial / "clinical.csv")
    truth.loadings().to_parquet(partial / "truth" / "loadings.parquet")
    patients.to_parquet(partial / "truth" / "patients.parquet")
    description = {"arguments": arguments, **truth.numbers()}
    (partial / "truth.json").write_text(json.dumps(description, indent=1) + "\n")
    partial.replace(out)


@dataclass(frozen=True, kw_only=True)
class _Truth:
    """What all institutions share: G genes, K programmes, C cancer types."""

    genes: list[str]
    """Length G."""
    mean: NDArray[np.float64]
    """m, shape (G,)."""
    linear: NDArray[np.float64]
    """a, shape (G, K)."""
    product: NDArray[np.float64]
    """b, shape (G, K); column k belongs to the product of programmes k and k + 1."""
    type_shift: NDArray[np.float64]
    """mu, shape (C, K)."""
    effect: NDArray[np.float64]
    """beta, shape (K,)."""
    scale_days: NDArray[np.float64]
    """lambda, shape (C,), days."""

    def loadings(self) -> pd.DataFrame:
        """Return mean, a and b as one table, genes in rows."""
        K = self.linear.shape[1]
        columns = ["mean", *_programmes(K), *_products(K)]
        values = np.column_stack([self.mean, self.linear, self.product])
        return pd.DataFrame(values, index=self.genes, columns=columns)

    def numbers(self) -> dict[str, object]:
        """Return what does not belong to a gene or a patient, for `truth.json`."""
        return {
            "programme_effects": self.effect.tolist(),
            "type_shifts": self.type_shift.tolist(),
            "weibull_scale_days": self.scale_days.tolist(),
            "weibull_shape": SHAPE,
            "mean_censoring_days": CENSORING_DAYS,
        }


def _refuse_unusable(arguments: dict[str, int]) -> None:
    least = {"seed": 0, "n_holdouts": 0, "patients_per_site": 5, "n_genes": 10}
    problems = [
        f"{name} is {value}; expected {least.get(name, 1)} or more."
        for name, value in arguments.items()
        if value < least.get(name, 1)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _holds(out: Path, arguments: dict[str, int]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    truth = out / "truth.json"
    if truth.is_file() and json.loads(truth.read_text())["arguments"] == arguments:
        return True
    raise ConfigError(
        f"{out} holds something else already; expected an absent or empty folder. "
        "Choose another folder, or delete this one."
    )


def _draw_truth(seed: int, n_genes: int, n_cancer_types: int) -> _Truth:
    rng = _generator(seed, "truth")
    G, K = n_genes, N_PROGRAMMES
    linear, product = np.zeros((G, K)), np.zeros((G, K))
    for g in range(G):
        loaded = rng.choice(K, GENE_PROGRAMMES, replace=False)
        linear[g, loaded] = rng.normal(0, 0.6, GENE_PROGRAMMES)
        product[g, rng.integers(K)] = rng.normal(0, 0.3)
    effect = np.zeros(K)
    effect[: K // 2] = rng.normal(size=K // 2)
    return _Truth(
        genes=[f"GENE{g:04d}" for g in range(1, G + 1)],
        mean=rng.uniform(1, 10, G),
        linear=linear,
        product=product,
        type_shift=rng.normal(0, TYPE_SHIFT, (n_cancer_types, K)),
        effect=effect * EFFECT / np.linalg.norm(effect),
        scale_days=np.geomspace(*SCALE_DAYS, n_cancer_types),
    )


def _draw_institution(
    truth: _Truth, seed: int, name: str, patients_per_site: int, measures_all: bool
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return expression, clinical table and truth of one institution's patients."""
    rng = _generator(seed, name)
    C, K = truth.type_shift.shape
    G = len(truth.genes)

    # The mean of exp(N(-sigma^2 / 2, sigma^2)) is 1.
    sigma = 0.4
    relative_size = np.exp(rng.normal(-(sigma**2) / 2, sigma))
    n = max(5, round(patients_per_site * relative_size))
    index = pd.Index(
        [f"{name.replace(' ', '-')}-{i:04d}" for i in range(1, n + 1)], name="patient"
    )

    cancer_type = rng.choice(C, size=n, p=rng.dirichlet(np.full(C, 2.0)))
    deviation = rng.normal(size=(n, K))  # (n, K): the scores within the cancer type
    z = truth.type_shift[cancer_type] + deviation
    batch_effect = rng.normal(0, SITE_SHIFT, G)
    signal = z @ truth.linear.T + (z * np.roll(z, -1, axis=1)) @ truth.product.T
    noise = rng.normal(0, NOISE, (n, G))
    y = np.logaddexp(0, truth.mean + signal + batch_effect + noise)  # (n, G)
    y = np.minimum(y, SATURATION)
    if not measures_all:
        y[:, rng.choice(G, round(UNMEASURED_SHARE * G), replace=False)] = np.nan

    log_hazard = deviation @ truth.effect
    waiting = rng.exponential(size=n) / np.exp(log_hazard)
    time = truth.scale_days[cancer_type] * waiting ** (1 / SHAPE)
    censoring = rng.exponential(CENSORING_DAYS, n)
    clinical = pd.DataFrame(
        {
            "institution": name,
            "duration": np.ceil(np.minimum(time, censoring)),
            "event": (time <= censoring).astype(int),
            "age": np.clip(rng.normal(62, 12, n), 20, 90).round(),
            "sex": rng.choice(["female", "male"], n),
            "cancer_type": [f"type-{c + 1}" for c in cancer_type],
        },
        index=index,
    )
    expression = pd.DataFrame(y.astype(np.float32), index, columns=truth.genes)
    patients = pd.DataFrame(z, index, columns=_programmes(K))
    return expression, clinical, patients.assign(log_hazard=log_hazard)


def _programmes(K: int) -> list[str]:
    return [f"programme-{k + 1}" for k in range(K)]


def _products(K: int) -> list[str]:
    names = _programmes(K)
    return [f"{names[k]}-x-{names[(k + 1) % K]}" for k in range(K)]


def _generator(seed: int, name: str) -> np.random.Generator:
    """Return the generator that belongs to a name, whatever else is drawn."""
    return np.random.default_rng([seed, *name.encode()])
