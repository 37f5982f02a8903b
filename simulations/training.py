"""Train a federation of patients in memory, without messages: many in little time.

The functions of `common.federation` in a loop, with each site's own round
(`client.training.local_round`) and the server's own mean
(`server.federation.strategy`). It ends in the same bits as the apps over messages,
whose rules are in force here too: a site on a foreign scale takes no part, an update
that cannot be used or is far beyond the others' does not count, and a site trains what
its policy permits. Every site answers every round, and there is no quorum. Secure
aggregation is left out: it changes the sum by less than rounding.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from fedgex.client.policy import Policy
from fedgex.client.training.local_round import train_round
from fedgex.common import federation
from fedgex.common.arrays import Arrays
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.dataset import Patients, to_patients
from fedgex.common.data.moments import Standardisation
from fedgex.common.data.vocabulary import Vocabulary, least_count
from fedgex.common.errors import DataError, UpdateError
from fedgex.common.federation import Update
from fedgex.common.models import factor_model, tasks
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.models.tasks import Parameters
from fedgex.common.study import Study
from fedgex.server.federation.strategy import combine

logger = logging.getLogger(__name__)

Policies = Mapping[str, Policy]
"""Policy of each site; one that is not named permits everything."""
UNRESTRICTED: Policies = MappingProxyType({})
PERMISSIVE = Policy.proposed(minimum_cohort=1, share_cross_products=True)


def vocabulary(
    study: Study,
    sites: Mapping[str, Cohort],
    public: Cohort | None = None,
    policies: Policies = UNRESTRICTED,
) -> Vocabulary:
    """Return the study's genes, or those that the sites agree on."""
    panels, share = {}, study.vocabulary.min_patient_share
    for name, cohort in sites.items():
        least = _min_cell_count(study, policies, name)
        if cohort.n_patients >= least:
            panels[name] = (
                cohort.genes  # which have values depends on patients
                if study.privacy.patient is not None
                else federation.observed_genes(cohort, min_count=least, min_share=share)
            )
    return federation.agree_vocabulary(study, panels, public)


def begin(
    study: Study,
    genes: Vocabulary,
    sites: Mapping[str, Cohort],
    public: Cohort | None = None,
    *,
    scale: Standardisation | None = None,
    policies: Policies = UNRESTRICTED,
) -> Checkpoint:
    """Return the model before the first round; it names the sites that take part.

    Parameters
    ----------
    public
        The server's public cohort, of a study that uses one.
    scale
        Of the genes; None: that of the sites, of which those on a foreign scale are
        left out, or of the public patients.
    """
    groups = None

    def least(name: str) -> int:
        return _min_cell_count(study, policies, name)

    names = [name for name in sorted(sites) if sites[name].n_patients >= least(name)]
    if public is not None and study.public.statistics:
        scale = federation.public_standardisation(public, genes)
        if study.linear_rank:
            patients = to_patients(public, genes)
            fewest = federation.MIN_PUBLIC_PATIENTS
            groups = federation.cross_products(study, patients, fewest, scale)
    else:
        if scale is None:
            moments = {
                name: federation.gene_moments(sites[name], genes, least(name))
                for name in names
            }
            for name, ratio in federation.foreign_sites(study, moments).items():
                off = "site=%s left out: on a foreign scale, %.2f"
                logger.warning(off, name, ratio)
                del moments[name]
            names, scale = sorted(moments), federation.standardisation(moments)
            federation.refuse_unknown(study, genes, scale)
        if study.linear_rank:
            patients_of = {
                name: to_patients(sites[name], genes)
                for name in names
                if _policy(policies, name).share_cross_products
            }
            groups = factor_model.pool_completed(
                lambda: (
                    federation.cross_products(study, patients, least(name), scale)
                    for name, patients in patients_of.items()
                ),
                study.linear_types,
                study.linear_rank,
            )
    return federation.initial_model(
        study,
        genes,
        scale,
        groups=groups,
        public=public,
        contributors={name: sites[name].n_patients for name in names},
    )


def model_of(
    study: Study,
    genes: Vocabulary,
    scale: Standardisation,
    parameters: Parameters,
    sites: Collection[str],
) -> Checkpoint:
    """Return a model that is there already, for `train` to go on from."""
    return Checkpoint(
        study=study,
        vocabulary=genes,
        standardisation=scale,
        phase=next(iter(study.phases)),
        round=0,
        parameters=parameters,
        trained_on={"sites": sorted(sites)},
    )


def train(
    model: Checkpoint,
    sites: Mapping[str, Patients],
    *,
    public: Patients | None = None,
    without: Collection[str] = (),
    policies: Policies = UNRESTRICTED,
) -> Checkpoint:
    """Train every phase over the sites that the model names.

    A site that cannot or may not train a phase sits it out, and a phase that no site
    trains is left out.

    Parameters
    ----------
    public
        The server's own patients, on which a phase begins if the study says so.
    without
        Phases to leave out.
    """
    study = model.study
    present = {n: sites[n] for n in sorted(sites) if n in model.trained_on["sites"]}
    with tempfile.TemporaryDirectory(prefix="fedgex-") as folder:
        for phase in (name for name in study.phases if name not in without):
            for number in range(1, study.phases[phase].rounds + 1):
                first = public if number == 1 else None
                begun = federation.begin_phase(study, phase, model.parameters, first)
                updates = list(
                    _updates(
                        study, phase, number, begun, present, Path(folder), policies
                    )
                )
                if not updates:
                    break
                aggregate = partial(_aggregate, study, number, updates)
                model = federation.next_model(model, begun, phase, number, aggregate)
    return model


def _aggregate(
    study: Study,
    number: int,
    updates: list[Update],
    incoming: Mapping[str, federation.Array],
    memory: Arrays,
) -> tuple[dict[str, federation.Array], dict[str, NDArray[np.generic]]]:
    rule, noise = study.strategy, study.privacy.site
    return combine(rule, incoming, updates, number, memory, noise)


def _updates(
    study: Study,
    phase: str,
    number: int,
    begun: Parameters,
    sites: Mapping[str, Patients],
    folder: Path,
    policies: Policies,
) -> Iterator[Update]:
    """Yield the updates that count in a round, in order of site."""
    incoming = federation.global_parameters(study, phase, begun)
    sent = tasks.download_state(study, phase, begun)
    found, norms, refused = {}, {}, {}
    for name, patients in sites.items():
        if _policy(policies, name).objections(study, [phase]):
            continue
        least = _min_cell_count(study, policies, name)
        try:
            result = train_round(
                study,
                phase,
                number,
                patients,
                sent,
                site=name,
                min_cell_count=least,
                state_dir=folder / name,
                evaluate=False,
            )
            norms[name] = federation.update_norm(study, incoming, result.update)
        except (DataError, UpdateError) as error:
            refused[name] = str(error)
            continue
        report = result.report  # none under privacy
        found[name] = Update(
            site=name,
            arrays=result.update,
            num_examples=None if report is None else report.num_examples,
            num_loss_terms=None if report is None else report.num_loss_terms,
            measured=_measured(study, patients, least),
        )
    refused |= federation.far_beyond(study, norms)
    for name, reason in refused.items():
        logger.info("%s-%d site=%s left out: %s", phase, number, name, reason)
    yield from (update for name, update in found.items() if name not in refused)


def _measured(study: Study, patients: Patients, least: int) -> NDArray[np.bool_]:
    """Return the genes that a site reports as measured, shape (V,)."""
    counts = patients.measured.sum(dim=0).numpy()
    if study.privacy.patient is not None:
        return np.asarray(counts > 0)
    share = least_count(study.vocabulary.min_patient_share, len(patients))
    return np.asarray(counts >= max(least, share))


def _policy(policies: Policies, site: str) -> Policy:
    return policies.get(site, PERMISSIVE)


def _min_cell_count(study: Study, policies: Policies, site: str) -> int:
    return max(_policy(policies, site).minimum_cohort, study.minimum_cohort)
