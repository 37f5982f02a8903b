"""Flower ClientApp of one hospital: decode, call, encode; no maths.

A site answers four messages (docs/messages.md): what it measures, the moments of the
agreed genes, their cross-products where it permits them, and one round of training.
Whatever goes wrong leaves the hospital as a code, never as text.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
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

from fedgex.client import local_training, secure_rounds, state
from fedgex.client.data.cohort import assay, load_cohort
from fedgex.client.ledger import debit
from fedgex.client.ledger.ledger import LedgerError
from fedgex.client.policy import Policy
from fedgex.client.secure_rounds import ExchangeError
from fedgex.client.settings import SiteSettings
from fedgex.common import keys
from fedgex.common.codes import Code
from fedgex.common.cohort import Cohort
from fedgex.common.errors import ConfigError, DataError
from fedgex.common.files import disk_full
from fedgex.common.harmonise import to_patients
from fedgex.common.records import floats, text, to_arrays, to_record
from fedgex.common.scale import Scale
from fedgex.common.statistics import GeneMoments, Standardisation, by_type, pack
from fedgex.common.study import Study
from fedgex.common.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SITES_VARIABLE = "FEDGEX_SITES"
"""Environment variable that names the folder of simulated sites; a simulated node is
the site at its partition's position in order of name. A hospital's node is configured
with `site-toml` instead."""

GOVERNED_BY = {
    keys.NUM_EXAMPLES: keys.NUM_PATIENTS,
    keys.NUM_LOSS_TERMS: keys.NUM_PATIENTS,
}
"""Numbers that a metric of the policy with another name covers."""

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
            content = _refusal(Code.STUDY_REFUSED)
        except (LedgerError, ExchangeError) as error:
            logger.error("refused: %s", error)
            content = _refusal(error.code)
        except Exception as error:  # its text could name a patient: it stays here
            logger.exception("failed")
            content = _refusal(_failure(error))
        return Message(content, reply_to=message)

    return reply


@app.query("prepare")
@answer
def prepare(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Say who is here, which genes are measured, and how many patients there are.

    A gene known of fewer samples than the floor, or than the study's share of them,
    counts as not measured. Under patient-level privacy, the columns of the file on the
    study's genes count as measured, whatever is in them, and nobody is counted.

    A run asks again after its server was started again; then the panel is still the
    one that the run began with.
    """
    cohort = _cohort(settings, study)
    record = message.content.config_records.get(keys.RUN)
    run = "" if record is None else text(record, keys.RUN_NAME)
    before = state.read_panel(_state_dir(settings, study))
    if run and before is not None and before.run == run:
        _refuse_drift(settings, study, cohort)
    scale = settings.data.scale.value
    if study.privacy.patient is None:
        told = _well_known(cohort, settings, study)
        panel = state.Panel(scale, cohort.genes, told, run)
    else:
        assayed, asked = assay(settings), set(study.vocabulary.genes)
        told = tuple(g for g in assayed if not asked or g in asked)
        panel = state.Panel(scale, assayed, told, run)
    site = ConfigRecord(
        {
            keys.NAME: settings.name,
            keys.VERSION: version("fedgex"),
            keys.GENES: list(told),
            keys.SHARES_CROSS_PRODUCTS: settings.policy.share_cross_products,
        }
    )
    state.remember_panel(_state_dir(settings, study), panel)
    content = RecordDict({keys.SITE: site})
    if keys.NUM_PATIENTS in _permitted(settings, study):
        site[keys.NUM_PATIENTS] = cohort.n_patients
    else:
        content[keys.WITHHELD] = ConfigRecord({keys.METRICS: [keys.NUM_PATIENTS]})
    return content


@app.query("statistics")
@answer
def statistics(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Send count, sum and sum of squares of each gene of the vocabulary.

    A gene measured in fewer patients than the floor is suppressed.
    """
    _refuse_sums(study)
    cohort, vocabulary = _cohort(settings, study), _vocabulary(message)
    raw = Standardisation(mean=np.zeros(len(vocabulary)), sd=np.ones(len(vocabulary)))
    values = to_patients(cohort, vocabulary, raw).values.numpy()
    moments = GeneMoments.of(values).suppressed(_floor(settings, study))
    arrays = {
        "count": moments.count,
        "total": moments.total,
        "square-total": moments.square_total,
    }
    content = RecordDict({keys.MOMENTS: to_record(arrays)})
    numbers = {keys.NUM_PATIENTS: moments.n_patients}
    _add_metrics(content, numbers, _permitted(settings, study))
    return content


@app.query("cross_products")
@answer
def cross_products(
    message: Message, settings: SiteSettings, study: Study
) -> RecordDict:
    """Send cross-products of each cancer type's patients, if this hospital permits it.

    Of the types that the study tells apart, and of all other patients together.
    """
    _refuse_sums(study)
    if not settings.policy.share_cross_products:
        raise ConfigError(
            "the study asks for cross-products, which expose the row space of a small "
            "site; set share_cross_products = true in policy.toml to permit them."
        )
    cohort, vocabulary = _cohort(settings, study), _vocabulary(message)
    patients = to_patients(cohort, vocabulary, _standardisation(message))
    groups = by_type(
        patients.values.numpy(),
        patients.cancer_type,
        study.linear_types,
        _floor(settings, study),
    )
    arrays = {
        f"{group}/{name}": array
        for group, sums in groups.items()
        for name, array in (
            ("products", pack(sums.products)),
            ("pair-counts", pack(sums.pair_counts)),
            ("totals", sums.totals),
        )
    }
    return RecordDict({keys.PRODUCTS: to_record(arrays)})


@app.query("secagg_keys")
@answer
def secagg_keys(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Make keys for a round of secure aggregation, if this site can take part in it."""
    phase = text(message.content.config_records[keys.ROUND], keys.PHASE)
    cohort, vocabulary = _cohort(settings, study), _vocabulary(message)
    _refuse_drift(settings, study, cohort)
    raw = Standardisation(mean=np.zeros(len(vocabulary)), sd=np.ones(len(vocabulary)))
    patients = to_patients(cohort, vocabulary, raw)
    local_training.enough(study, phase, patients, _floor(settings, study))
    panel = state.read_panel(_state_dir(settings, study))
    told = () if panel is None else panel.told
    measured = np.isin(vocabulary.genes, told)
    return secure_rounds.advertise(message, settings, study, measured)


@app.query("secagg_shares")
@answer
def secagg_shares(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Share the round's secrets among the participants."""
    return secure_rounds.share(message, settings, study)


@app.query("secagg_confirm")
@answer
def secagg_confirm(
    message: Message, settings: SiteSettings, study: Study
) -> RecordDict:
    """Tell the other sites whose updates the server says it has."""
    return secure_rounds.confirm(message, settings, study)


@app.query("secagg_unmask")
@answer
def secagg_unmask(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Give out what it takes to see the sum, and no more."""
    return secure_rounds.unmask(message, settings, study)


@app.train()
@answer
@secure_rounds.masked
def train(message: Message, settings: SiteSettings, study: Study) -> RecordDict:
    """Judge the incoming model on the own patients, then train it for one round."""
    started = time.monotonic()
    order = message.content.config_records[keys.ROUND]
    phase, number = text(order, keys.PHASE), int(str(order[keys.NUMBER]))
    cohort = _cohort(settings, study)
    _refuse_drift(settings, study, cohort)
    local_training.refuse_large_delta(study, cohort.n_patients)
    debit.charge(message, settings, study, phase, number, cohort.patients)
    patients = to_patients(cohort, _vocabulary(message), _standardisation(message))
    result = local_training.train_round(
        study,
        phase,
        number,
        patients,
        floats(to_arrays(message.content.array_records[keys.MODEL])),
        site=settings.name,
        floor=_floor(settings, study),
        state_dir=_state_dir(settings, study),
    )
    content = RecordDict({keys.UPDATE: to_record(result.update)})
    report = result.report
    numbers = {
        keys.NUM_EXAMPLES: None if report is None else report.num_examples,
        keys.NUM_LOSS_TERMS: None if report is None else report.num_loss_terms,
        keys.TRAIN_LOSS: None if report is None else report.train_loss,
        keys.JUDGED_LOSS: result.judged_loss,
        keys.SECONDS: time.monotonic() - started,
    }
    _add_metrics(content, numbers, _permitted(settings, study))
    return content


def _add_metrics(
    content: RecordDict,
    numbers: Mapping[str, int | float | None],
    permitted: Collection[str],
) -> None:
    """Add the numbers that are permitted, and the names of the others."""
    told: dict[str, int | float | list[int] | list[float]] = {
        key: value
        for key, value in numbers.items()
        if value is not None and GOVERNED_BY.get(key, key) in permitted
    }
    content[keys.METRICS] = MetricRecord(told)
    if unsaid := sorted(set(numbers) - set(told)):
        content[keys.WITHHELD] = ConfigRecord({keys.METRICS: unsaid})


def _permitted(settings: SiteSettings, study: Study) -> tuple[str, ...]:
    """Return the metrics that may leave; none under patient-level privacy."""
    return () if study.privacy.patient is not None else settings.policy.metrics


def _refuse_sums(study: Study) -> None:
    """Refuse sums over patients under patient-level privacy: they have no noise."""
    if study.privacy.patient is not None:
        raise ConfigError(
            "the study promises patient-level privacy, and sums over patients were "
            "asked for; its means and standard deviations come from the public cohort."
        )


def _well_known(
    cohort: Cohort, settings: SiteSettings, study: Study
) -> tuple[str, ...]:
    """Return the genes that are known of enough samples."""
    counts = (~np.isnan(cohort.expression)).sum(axis=0)
    enough = study.vocabulary.min_patient_share * len(cohort.patients)
    known = counts >= max(_floor(settings, study), enough)
    return tuple(g for g, k in zip(cohort.genes, known, strict=True) if k)


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
    _refuse_other_version(message)
    _refuse_unpermitted(message, study, settings.policy)
    torch.set_num_threads(settings.policy.threads)
    return study


def _refuse_other_version(message: Message) -> None:
    """Refuse a server of another major or minor version than this site's."""
    server = message.content.config_records.get(keys.SERVER, ConfigRecord())
    theirs, ours = str(server.get(keys.VERSION, "unknown")), version("fedgex")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        wanted = ".".join(ours.split(".")[:2])
        raise ConfigError(
            f"the server runs fedgex {theirs}, this site {ours}; expected the same "
            f"major and minor version. Install {wanted} there, or theirs here."
        )


def _refuse_unpermitted(message: Message, study: Study, policy: Policy) -> None:
    """Refuse what the policy refuses of a study, and of the phase that is to train."""
    order = message.content.config_records.get(keys.ROUND)
    phases = () if order is None else (text(order, keys.PHASE),)
    if against := policy.objections(study, phases):
        raise ConfigError(" ".join(against))


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
    return max(settings.policy.minimum_cohort, study.minimum_cohort)


def _failure(error: Exception) -> Code:
    """Return the code of something unforeseen."""
    # On a CPU, torch tells of exhausted memory by the text alone.
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or on_cpu:
        return Code.OUT_OF_MEMORY
    if disk_full(error):
        return Code.DISK_FULL
    lost = isinstance(error, torch.AcceleratorError)
    return Code.DEVICE_LOST if lost else Code.FAILED


def _refuse_drift(settings: SiteSettings, study: Study, cohort: Cohort) -> None:
    """Refuse data that are no longer what `prepare` told the server of."""
    panel = state.read_panel(_state_dir(settings, study))
    genes = set(cohort.genes)
    if panel is not None and study.privacy.patient is not None:
        genes |= set(panel.told)  # whether they have values depends on patients
    if panel is None or panel.holds(settings.data.scale.value, genes):
        return
    raise DataError(
        [
            Code.PANEL_CHANGED.finding(
                where=settings.data.expression.name,
                found="other genes, or another scale, than when the run began",
                expected="the same columns and data.scale until the run ends",
                action="Put the file back; a new export is for the next run.",
            )
        ]
    )


def _state_dir(settings: SiteSettings, study: Study) -> Path:
    return settings.state_dir / study.hash[:16]


def _refusal(code: str) -> RecordDict:
    return RecordDict({keys.REFUSAL: ConfigRecord({keys.CODE: code})})


def _cohort(settings: SiteSettings, study: Study) -> Cohort:
    tasks = tuple(task for task in study.phases if task in settings.policy.tasks)
    data = settings.data
    files = [data.expression, data.clinical, data.opt_outs]
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
