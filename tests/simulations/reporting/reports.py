"""Reports as runs might give them: full, unusual, and bare."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

IMPUTERS = {
    "model": 0.40,
    "mean": 1.0,
    "knn": 0.55,
    "ppca": 0.44,
    "gaussian": 0.38,
    "mixture": 0.43,
}
COHORTS = ("BRCA", "GBM", "HNSC", "KIRC", "LUAD", "OV", "STAD")
SURVIVAL = {
    "alone": 0.56,
    "federated": 0.63,
    "pooled": 0.64,
    "cox_ridge": 0.65,
    "pca_cox": 0.61,
}
CLASSIFIERS = {"alone": 0.55, "federated": 0.80, "pooled": 0.82, "logistic": 0.79}


def make_report() -> dict[str, Any]:
    """Return a report as a run on 25 hospitals might give it."""
    rng = np.random.default_rng(1)
    return {
        "schema": 1,
        "study": {
            "name": "pan-cancer",
            "hash": "5f2c8a1be0d34c77",
            "seed": 1,
            "scale": "log2p1",
            "preset": "tiny",
            "parameters": 412_345,
            "vocabulary": {"genes": 1500, "hash": "99ab12cd"},
            "sites": [
                {
                    "name": f"hospital-{i:02}",
                    "patients": int(rng.integers(40, 600)),
                    "genes": int(rng.integers(1100, 1501)),
                    "train_loss": float(rng.normal(0.5, 0.03)),
                }
                for i in range(1, 26)
            ],
            "holdout": {"patients": 512, "institutions": ["A7", "E2", "BH"]},
            "versions": {"fedgex": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0"},
            "command": "fedgex-sim run scenarios/pan-cancer.toml --seed 1",
            "seconds": 1834.2,
            "public": {"patients": 214, "institutions": ["P1", "P2"]},
            "protections": ["Patient-level differential privacy: epsilon at most 8."],
            "notes": ["Hospitals are groups of TCGA tissue source sites."],
        },
        "rounds": _rounds(rng),
        "imputation": {m: _errors(m, e, rng) for m, e in IMPUTERS.items()},
        "imputation_per_gene": _per_gene(rng),
        "survival": {c: _concordance(c, rng) for c in COHORTS},
        "kaplan_meier": {
            c: {
                "low": _curve(rng, 2600.0, 61),
                "high": _curve(rng, 1500.0, 60),
                "logrank_p": float(p),
            }
            for c, p in zip(
                COHORTS, [2e-5, 0.21, 0.034, 0.0004, 0.018, 0.47, 0.09], strict=True
            )
        },
        "classification": {
            m: {
                str(n): {
                    "accuracy": top - 0.9 / math.sqrt(n),
                    "macro_f1": top - 0.05 - 1.0 / math.sqrt(n),
                }
                for n in (16, 32, 64, 128, 256, 1500)
            }
            for m, top in CLASSIFIERS.items()
        },
        "cost": {
            "samples_per_s": 913.2,
            "round_overhead_s": 1.42,
            "bytes_up": 1_204_554_112,
            "bytes_down": 1_310_000_000,
            "peak_rss_mb": 2311.0,
        },
    }


def _rounds(rng: np.random.Generator) -> list[dict[str, Any]]:
    rounds = []
    for phase, n, start in (
        ("pretraining", 30, 1.0),
        ("classification", 15, 2.8),
        ("survival", 20, 1.4),
    ):
        for i in range(1, n + 1):
            loss = start * (0.42 + 0.58 * math.exp(-i / 8)) + rng.normal(0, 0.006)
            error = 0.40 + 0.6 * math.exp(-i / 7) + rng.normal(0, 0.004)
            rounds.append(
                {
                    "phase": phase,
                    "round": i,
                    "train_loss": loss,
                    "judged_loss": None if i == 1 else loss * 1.03,
                    "holdout_mse": {
                        "mcar": {"0.1": error - 0.1, "0.5": error},
                        "panel": {"50": error + 0.2, "100": error + 0.1},
                        "mnar": {"0.5": error + 0.35},
                    }
                    if phase == "pretraining"
                    else None,
                    "seconds": 28.0,
                    "sites_contributed": 22 if (phase, i) == ("survival", 4) else 25,
                    "sites_total": 25,
                }
            )
    return rounds


def _errors(method: str, error: float, rng: np.random.Generator) -> dict[str, Any]:
    def score(mse: float) -> dict[str, Any]:
        mse += float(rng.normal(0, 0.004))
        return {
            "mse": mse,
            "mae": 0.8 * math.sqrt(mse),
            "pearson": math.nan if method == "mean" else math.sqrt(max(1 - mse, 0.01)),
            "spearman": None if method == "mean" else 0.96 * (1 - mse / 2),
            "genes_r_above_0": 0 if method == "mean" else 1490,
            "genes_r_above_half": 0 if method == "mean" else 1100,
            "genes_judged": 1500,
        }

    flat = 0.0 if method == "mean" else 1.0
    return {
        "mcar": {
            str(r): score(error + flat * 0.25 * (r - 0.5) * abs(r - 0.2))
            for r in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
        },
        "panel": {
            str(n): score(error + flat * (0.25 - 0.04 * math.log2(n / 12.5)))
            for n in (50, 100, 200)
        },
        "mnar": {
            str(r): score(error * (1.2 + 0.9 * r))
            for r in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
        },
    }


def _per_gene(rng: np.random.Generator) -> dict[str, Any]:
    gaussian = rng.beta(2.2, 3.2, 1500)
    model = gaussian * rng.normal(1.03, 0.09, 1500)
    return {
        "rate": "0.5",
        "genes": [f"GENE{i}" for i in range(1500)],
        "model_mse": model.tolist(),
        "gaussian_mse": gaussian.tolist(),
        "model_r": np.sqrt(np.clip(1 - model, 0, 1)).tolist(),
    }


def _concordance(cohort: str, rng: np.random.Generator) -> dict[str, Any]:
    shift = float(rng.normal(0, 0.04))
    scores: dict[str, Any] = {
        method: {
            "c_index": c + shift + float(rng.normal(0, 0.01)),
            "sd": 0.035,
            "patients": 121,
            "events": 44,
            "reason": None,
        }
        for method, c in SURVIVAL.items()
    }
    if cohort == "GBM":
        scores["alone"] |= {
            "c_index": None,
            "sd": None,
            "reason": "no hospital has 5 deaths",
        }
    return scores


def _curve(rng: np.random.Generator, mean_days: float, n: int) -> dict[str, Any]:
    days = np.sort(rng.exponential(mean_days, n))
    days = days[days < 3650]
    survival = np.cumprod(1 - 1 / (n - np.arange(len(days))))
    return {
        "days": [0.0, *days.tolist()],
        "survival": [1.0, *survival.tolist()],
        "patients": n,
    }


def unusual(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report with one phase, one cohort, and hardly a number."""
    nothing = {"c_index": None, "patients": 3, "events": 0, "reason": "no deaths"}
    flat = {"days": [], "survival": [], "patients": 1}
    return bare(report) | {
        "rounds": [
            {
                "phase": "tuning",
                "round": 1,
                "train_loss": math.nan,
                "judged_loss": None,
                "holdout_mse": None,
                "seconds": 1.0,
                "sites_contributed": 0,
                "sites_total": 2,
            }
        ],
        "imputation": {"knn": {"panel": {"50": {"mse": None}}}, "mean": {}},
        "imputation_per_gene": {
            "rate": "0.5",
            "genes": ["A"],
            "model_mse": [math.nan],
            "gaussian_mse": [0.5],
            "model_r": [-1.0],
        },
        "survival": {"BRCA": {"federated": nothing}, "OV": {}},
        "kaplan_meier": {"BRCA": {"low": flat, "high": flat, "logrank_p": math.nan}},
        "classification": {"alone": {"8": {"accuracy": None, "macro_f1": None}}},
    }


def bare(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a run that measured nothing."""
    empty: dict[str, Any] = {
        section: {} for section in ("imputation", "survival", "classification", "cost")
    }
    return {"schema": 1, "study": report["study"]} | empty
