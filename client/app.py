"""Flower ClientApp of one hospital: decode, call, encode; no maths.

A site answers four messages (docs/messages.md): what it measures, the moments of the
agreed genes, their cross-products where it permits them, and one round of training.
Whatever goes wrong leaves the hospital as a code, never as text.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from flwr.app import (
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from fedgex.client import local_training
from fedgex.client.settings import SiteSettings
from fedgex.client.validation import load_cohort
from fedgex.common import keys
from fedgex.common.cohort import Cohort
from fedgex.common.errors import ConfigError, DataError
from fedgex.common.harmonise import to_patients
from fedgex.common.records import floats, text, to_arrays, to_record
from fedgex.common.scale import Scale
from fedgex.common.statistics import CrossProducts, GeneMoments, Standardisation, pack
from fedgex.common.study import Study
from fedgex.common.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SITES_VARIABLE = "FEDGEX_SITES"
"""Environment variable that names the folder of simulated sites; a simulated node is
the site at its partition's position in order of name. A hospital's node is configured
with `site-toml` instead."""

FAILED, REFUSED_STUDY = "FX-SITE-001", "FX-SITE-002"

app = ClientApp()
Handler = Callable[[Message, SiteSettings, Study], RecordDict]


def answer(handler: Handler) -> Callable[[Message, Context], Message]:
    """Turn a handler into what Flower calls: load the site, check the study, guard."""

    @wraps(handler)
    def reply(message: Message, context: Context) -> Message:
        try:
            settings = SiteSettings.load(_site_toml(context))
            content = handler(message, settings, _study(message, settings))
        except DataError as error:
            logger.error("refused: %s", error)
            code = next(f.code for f in error.findings if f.severity == "error")
            content = _refusal(code)
        except ConfigError as error:
            logger.error("refused: %s", error)
            content = _refusal(REFUSED_STUDY)
        except Exception:  # its text could name a patient, so it must not travel
            logger.exception("failed")
            content = _refusal(FAILED)
        return Message(content, reply_to=message)

    return reply


@app.query("prepare")
@answer
def prepare(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Say who is here, which genes are measured, and how many patients there are.

    A gene known of fewer samples than the floor, or than the study's share of them,
    counts as not measured.
    """
    cohort = _cohort(settings, study)
    counts = (~np.isnan(cohort.expression)).sum(axis=0)
    enough = study.vocabulary.min_patient_share * len(cohort.patients)
    known = counts >= max(_floor(settings, study), enough)
    site = ConfigRecord(
        {
            keys.NAME: settings.name,
            keys.VERSION: version("fedgex"),
            keys.GENES: [g for g, k in zip(cohort.genes, known, strict=True) if k],
            keys.NUM_PATIENTS: cohort.n_patients,
            keys.SHARES_CROSS_PRODUCTS: settings.share_cross_products,
        }
    )
    return RecordDict({keys.SITE: site})


@app.query("statistics")
@answer
def statistics(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Send count, sum and sum of squares of each gene of the vocabulary.

    A gene measured in fewer patients than the floor counts as not measured.
    """
    cohort, vocabulary = _cohort(settings, study), _vocabulary(message)
    raw = Standardisation(mean=np.zeros(len(vocabulary)), sd=np.ones(len(vocabulary)))
    values = to_patients(cohort, vocabulary, raw).values.numpy()
    moments = GeneMoments.of(values)
    known = moments.count >= _floor(settings, study)
    arrays = {
        "count": np.where(known, moments.count, 0),
        "total": np.where(known, moments.total, 0.0),
        "square-total": np.where(known, moments.square_total, 0.0),
    }
    counted = MetricRecord({keys.NUM_PATIENTS: moments.n_patients})
    return RecordDict({keys.MOMENTS: to_record(arrays), keys.METRICS: counted})


@app.query("cross_products")
@answer
def cross_products(
    message: Message, settings: SiteSettings, study: Study
) -> RecordDict:
    """Send cross-products of standardised genes, if this hospital permits it."""
    if not settings.share_cross_products:
        raise ConfigError(
            "the study asks for cross-products, which expose the row space of a small "
            "site; set share_cross_products = true in site.toml to permit them."
        )
    cohort, vocabulary = _cohort(settings, study), _vocabulary(message)
    patients = to_patients(cohort, vocabulary, _standardisation(message))
    sums = CrossProducts.of(patients.values.numpy())
    known = sums.pair_counts >= _floor(settings, study)
    arrays = {
        "products": pack(np.where(known, sums.products, 0.0)),
        "pair-counts": pack(np.where(known, sums.pair_counts, 0)),
    }
    return RecordDict({keys.PRODUCTS: to_record(arrays)})


@app.train()
@answer
def train(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Judge the incoming model on the own patients, then train it for one round."""
    started = time.monotonic()
    order = message.content.config_records[keys.ROUND]
    phase, number = text(order, keys.PHASE), int(str(order[keys.NUMBER]))
    if phase not in settings.tasks:
        raise ConfigError(
            f'the study asks for "{phase}"; site.toml permits {settings.tasks}.'
        )
    patients = to_patients(
        _cohort(settings, study), _vocabulary(message), _standardisation(message)
    )
    result = local_training.train_round(
        study,
        phase,
        number,
        patients,
        floats(to_arrays(message.content.array_records[keys.MODEL])),
        site=settings.name,
        floor=_floor(settings, study),
        state_dir=settings.state_dir / study.hash[:16],
    )
    numbers: dict[str, int | float | list[int] | list[float]] = {
        keys.NUM_EXAMPLES: result.report.num_examples,
        keys.NUM_LOSS_TERMS: result.report.num_loss_terms,
        keys.TRAIN_LOSS: result.report.train_loss,
        keys.JUDGED_LOSS: result.judged_loss,
        keys.SECONDS: time.monotonic() - started,
    }
    return RecordDict(
        {keys.UPDATE: to_record(result.update), keys.METRICS: MetricRecord(numbers)}
    )


def _site_toml(context: Context) -> Path:
    """Return the settings file of the site that this node is."""
    named = context.node_config.get("site-toml")
    if named is not None:
        return Path(str(named))
    folder = os.environ.get(SITES_VARIABLE)
    if folder is None:
        raise ConfigError(
            "this node has no site-toml in its node config, and "
            f"{SITES_VARIABLE} is not set; name the hospital's site.toml."
        )
    sites = sorted(path for path in Path(folder).iterdir() if path.is_dir())
    return sites[int(context.node_config["partition-id"])] / "site.toml"


def _study(message: Message, settings: SiteSettings) -> Study:
    """Return the study of a message, refused if it is not what its hash says."""
    record = message.content.config_records[keys.STUDY]
    study = Study.from_json(text(record, keys.JSON), "the study sent")
    if text(record, keys.HASH) != study.hash:
        raise ConfigError("the study sent differs from its hash; ask the coordinator.")
    if text(record, keys.VERSION) != version("fedgex"):
        raise ConfigError(
            f"the server runs fedgex {text(record, keys.VERSION)}, this site "
            f"{version('fedgex')}; install the same version."
        )
    torch.set_num_threads(1)  # equal bits wherever the site runs
    return study


def _vocabulary(message: Message) -> Vocabulary:
    record = message.content.config_records[keys.VOCABULARY]
    genes = record[keys.GENES]
    if not isinstance(genes, list):
        raise ConfigError("the vocabulary sent is no list of genes.")
    vocabulary = Vocabulary(tuple(str(gene) for gene in genes))
    if text(record, keys.HASH) != vocabulary.hash:
        raise ConfigError("the vocabulary sent differs from its hash.")
    return vocabulary


def _standardisation(message: Message) -> Standardisation:
    record = message.content.array_records[keys.STANDARDISATION]
    arrays = to_arrays(record)
    return Standardisation(
        mean=arrays["mean"].astype(np.float64), sd=arrays["sd"].astype(np.float64)
    )


def _floor(settings: SiteSettings, study: Study) -> int:
    """Return the smallest count that may leave: the stricter of site and study."""
    return max(settings.minimum_cohort, study.minimum_cohort)


def _refusal(code: str) -> RecordDict:
    return RecordDict({keys.REFUSAL: ConfigRecord({keys.CODE: code})})


def _cohort(settings: SiteSettings, study: Study) -> Cohort:
    tasks = tuple(task for task in study.phases if task in settings.tasks)
    files = [settings.data.expression, settings.data.clinical]
    changed = tuple(p.stat().st_mtime_ns for p in files if p is not None and p.exists())
    return _read(settings, study.scale, tasks, changed)


@lru_cache(maxsize=256)
def _read(
    settings: SiteSettings,
    scale: Scale,
    tasks: tuple[str, ...],
    changed: tuple[int, ...],
) -> Cohort:
    """Read and check a site's files; kept warm between rounds until they change."""
    return load_cohort(settings, scale, tasks)[0]
