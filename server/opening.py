"""Before the first round: who is here, which genes, their moments, cross-products.

    (contract) -> prepare -> statistics -> (cross-products) -> the first parameters
                     or the public cohort -> (its own pretraining)

A site whose answer cannot be used is left out of what it was for, one whose numbers are
on a foreign scale of the whole run, and the journal says why.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from fedgex.common import codes, keys, start, tasks
from fedgex.common.checkpoint import Checkpoint
from fedgex.common.cohort import Cohort
from fedgex.common.errors import FederationError, UpdateError
from fedgex.common.files import explained, read_json, write_atomic
from fedgex.common.harmonise import to_patients
from fedgex.common.records import text, to_arrays, to_record
from fedgex.common.scale import LOGARITHMIC
from fedgex.common.statistics import (
    MIN_SITES,
    OTHERS,
    CrossProducts,
    GeneMoments,
    Standardisation,
    foreign_scales,
    pool,
    unpack,
)
from fedgex.common.study import NAME_PATTERN, PRETRAINING, Study
from fedgex.common.vocabulary import Vocabulary, agree
from fedgex.server import public, public_start
from fedgex.server.asking import Line, Request, Simulated, ask
from fedgex.server.deployment import Deployment
from fedgex.server.journal import Journal
from fedgex.server.rounds import Site, require_quorum, withheld
from fedgex.server.settings import ServerSettings

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")


def study_record(study: Study) -> ConfigRecord:
    """Return the study as it travels."""
    return ConfigRecord({keys.JSON: study.to_json(), keys.HASH: study.hash})


def vocabulary_record(vocabulary: Vocabulary) -> ConfigRecord:
    """Return the vocabulary as it travels."""
    return ConfigRecord(
        {keys.GENES: list(vocabulary.genes), keys.HASH: vocabulary.hash}
    )


def standardisation_record(scale: Standardisation) -> Any:
    """Return means and standard deviations as they travel."""
    return to_record({"mean": scale.mean, "sd": scale.sd})


@dataclass(kw_only=True)
class Opening:
    """The sites of a run, found and asked for all that the first round needs."""

    grid: Grid
    settings: ServerSettings
    study: Study
    journal: Journal
    deployment: Deployment | None
    public_cohort: Cohort | None
    """None if the study takes nothing from one, or the model is there already."""
    line: Line = field(init=False)
    """The way to the sites that are present."""
    present: dict[str, ConfigRecord] = field(init=False, default_factory=dict)
    """What each site said of itself, in order of name."""
    absent: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)
    """State and reason of each site, known by name, that takes no part."""

    def gather(self) -> None:
        """Wait for the sites, and ask each who it is.

        Raises
        ------
        FederationError
            If fewer come than the quorum, or not all mandatory ones.
        """
        if self.deployment is None:
            self._gather_simulated()
        else:
            self._gather_invited(self.deployment)
        self.present = dict(sorted(self.present.items()))
        if (path := self._kept("foreign-scales.json")).exists():
            self._leave_out(read_json(path, "what was found when the run began"))

    def sites(self, vocabulary: Vocabulary) -> list[Site]:
        """Return the sites that are present, with what they measure."""
        sites = []
        for name, told in self.present.items():
            genes: Any = told[keys.GENES]
            patients: Any = told.get(keys.NUM_PATIENTS)
            measured = np.isin(vocabulary.genes, genes)
            sites.append(Site(name=name, measured=measured, n_patients=patients))
        return sites

    def begin(self) -> Checkpoint:
        """Return the model before the first round: genes, their scale, parameters.

        Raises
        ------
        UpdateError
            If no site sends statistics.
        FederationError
            If the study asks for cross-products and fewer than two sites send them, or
            without those on a foreign scale too few sites are left.
        ConfigError
            If the public cohort lacks genes of the study.
        """
        study, vocabulary = self.study, self._vocabulary()
        parameters = tasks.initial(study, len(vocabulary))
        cohort, groups = self.public_cohort, None
        if cohort is not None and study.public.statistics:
            scale = public_start.standardisation(cohort, vocabulary)
            if study.linear_rank:
                groups = public_start.cross_products(study, cohort, vocabulary, scale)
        else:
            scale = self._standardisation(vocabulary)
            if study.cross_products:
                groups = self._cross_products(vocabulary, scale)
        if groups is not None:
            path = self.settings.run_dir / "covariance.safetensors"
            write_atomic(path, save({"covariance": pool(groups.values()).covariance()}))
            parameters |= tasks.linear_start(study, groups)
        if cohort is not None and study.public.epochs:
            patients = to_patients(cohort, vocabulary, scale)
            parameters = public_start.fit_phase(
                study, PRETRAINING, patients, parameters
            )
        sites = self.sites(vocabulary)
        return Checkpoint(
            study=study,
            vocabulary=vocabulary,
            standardisation=scale,
            phase=next(iter(study.phases)),
            round=0,
            parameters=parameters,
            trained_on={
                "sites": [site.name for site in sites],
                "patients": _total(site.n_patients for site in sites),
            },
        )

    # ---- who is here ----

    def _gather_simulated(self) -> None:
        end = time.monotonic() + self.settings.start_deadline_s
        nodes = list(self.grid.get_node_ids())
        while len(nodes) < self.settings.n_sites and time.monotonic() < end:
            time.sleep(self.settings.poll_s)
            nodes = list(self.grid.get_node_ids())
        unnamed = {f"node {node}": node for node in sorted(nodes)}
        self.line = self._line(Simulated(unnamed))
        named = {}
        for node, content in self._ask(unnamed, RecordDict(), keys.PREPARE, _same):
            introduced = self._introduced(node, content)
            if introduced is None:
                continue
            name, told = introduced
            if name in named:
                raise FederationError(
                    f'two nodes call themselves "{name}"; give each site its own name.'
                )
            named[name], self.present[name] = unnamed[node], told
        needed = self.study.rounds.quorum
        if len(named) < needed:
            raise FederationError(
                f"{len(named)} of {self.settings.n_sites} sites are ready, the quorum "
                f"is {needed}; the journal says who refused and why."
            )
        self.line = self._line(Simulated(named))

    def _gather_invited(self, deployment: Deployment) -> None:
        """Have the contract admitted by the sites that it names, and ask those."""
        self.line = self._line(deployment)
        rule = self.study.rounds
        answers = deployment.offer(
            self.line, self.settings.start_deadline_s, codes.TEMPORARY
        )
        for site, answer in answers.items():
            if answer["state"] != "contributed":
                self._report(site, str(answer["state"]), str(answer["reason"]))
        require_quorum(answers, rule, "the contract")
        ready = [s for s, a in answers.items() if a["state"] == "contributed"]
        for site, content in self._ask(ready, RecordDict(), keys.PREPARE, _same):
            introduced = self._introduced(site, content)
            if introduced is None:
                continue
            name, told = introduced
            if name == site:
                self.present[site] = told
            else:
                reason = f'it calls itself "{name}", and its node is that of "{site}"'
                self._report(site, "quarantined", reason)
        here = {name: {"state": "contributed"} for name in self.present}
        require_quorum(here | self.absent, rule, "the start")

    def _introduced(
        self, who: str, content: RecordDict
    ) -> tuple[str, ConfigRecord] | None:
        try:
            return _introduction(content, self.study.minimum_cohort)
        except (KeyError, UpdateError) as error:
            self._report(who, "quarantined", f"the reply cannot be used: {error}")
            return None

    def _line(self, peers: Simulated | Deployment) -> Line:
        return Line(
            grid=self.grid,
            peers=peers,
            journal=self.journal,
            poll_s=self.settings.poll_s,
        )

    # ---- what they measure ----

    def _vocabulary(self) -> Vocabulary:
        rule = self.study.vocabulary
        if rule.genes:
            return Vocabulary(tuple(sorted(rule.genes)))
        panels: dict[str, Any] = {n: t[keys.GENES] for n, t in self.present.items()}
        if self.public_cohort is not None and self.study.public.statistics:
            known = public.well_known(self.public_cohort, rule.min_patient_share)
            panels = {name: known & set(genes) for name, genes in panels.items()}
        return agree(panels, rule.min_share)

    def _standardisation(self, vocabulary: Vocabulary) -> Standardisation:
        """Pool the moments, once in a run.

        Whoever is there when the run begins anew, the sites have answered questions
        that hold these very numbers, and answer no others.
        """
        path = self._kept("start.safetensors")
        if path.exists():
            kept = load_file(path)
            return Standardisation(mean=kept["mean"], sd=kept["sd"])
        moments = dict(
            self._ask(
                self.present,
                RecordDict({keys.VOCABULARY: vocabulary_record(vocabulary)}),
                keys.STATISTICS,
                lambda content: _moments(content, len(vocabulary)),
            )
        )
        if self.study.scale in LOGARITHMIC:
            foreign = foreign_scales(moments)
            write_atomic(
                self._kept("foreign-scales.json"), json.dumps(foreign).encode()
            )
            self._leave_out(foreign)
            moments = {n: m for n, m in moments.items() if n not in foreign}
        pooled = pool(moments[name] for name in sorted(moments))
        write_atomic(path, save({"mean": pooled.mean, "sd": pooled.sd}))
        return Standardisation(mean=pooled.mean, sd=pooled.sd)

    def _leave_out(self, foreign: Mapping[str, float]) -> None:
        """Leave sites on a foreign scale out of the run; the ratios say how foreign."""
        left = [name for name in foreign if self.present.pop(name, None) is not None]
        for name in left:
            reason = (
                f"the means of its genes are {foreign[name]:.2f} times the other "
                f"sites', expected about 1 where all are on the {self.study.scale} "
                "scale; have it correct data.scale, or its export, and begin a new run"
            )
            self._report(name, "quarantined", reason)
            self.absent[name] = {"state": "quarantined", "reason": reason}
        if left:
            here = {name: {"state": "contributed"} for name in self.present}
            require_quorum(self.absent | here, self.study.rounds, "the start")

    def _kept(self, name: str) -> Path:
        """Return the path of what is found once in a run of this study."""
        path = self.settings.run_dir / name
        return path.with_stem(f"{path.stem}-{self.study.hash[:16]}")

    def _cross_products(
        self, vocabulary: Vocabulary, scale: Standardisation
    ) -> dict[str, CrossProducts]:
        """Pool the cross-products of the sites that permit it, by cancer type.

        Where sites lack genes, as if they had them: see `start.pool_completed`.
        """
        content = RecordDict(
            {
                keys.VOCABULARY: vocabulary_record(vocabulary),
                keys.STANDARDISATION: standardisation_record(scale),
            }
        )
        spool = self.settings.run_dir / "spool"

        def to_disk(answer: RecordDict) -> Path:
            arrays = to_arrays(answer.array_records[keys.PRODUCTS])
            self._products(arrays, len(vocabulary))  # refused now, not when added up
            path = spool / f"{len(list(spool.iterdir()))}.safetensors"
            with explained(path):
                path.write_bytes(save(arrays))
            return path

        spool.mkdir(exist_ok=True)
        by_site = dict(self._ask(self.present, content, keys.CROSS_PRODUCTS, to_disk))
        if len(by_site) < MIN_SITES:
            raise FederationError(
                f"the study asks for cross-products and {len(by_site)} sites sent "
                f"them, expected {MIN_SITES} or more, so that none "
                "stands alone; set share_cross_products = true at more sites, or "
                "cross_products = false in the study."
            )

        def sites() -> Iterator[dict[str, CrossProducts]]:
            for name in sorted(by_site):
                yield self._products(load_file(by_site[name]), len(vocabulary))

        study = self.study
        pooled = start.pool_completed(sites, study.linear_types, study.linear_rank)
        shutil.rmtree(spool)
        return pooled

    def _products(
        self, arrays: Mapping[str, NDArray[Any]], n_genes: int
    ) -> dict[str, CrossProducts]:
        """Return a site's cross-products by group."""
        permitted = {*self.study.linear_types, OTHERS}
        groups = {name.rpartition("/")[0] for name in arrays}
        if unknown := groups - permitted:
            raise UpdateError(
                f"cross-products of {len(unknown)} groups that the study does not name"
            )
        if not groups:
            raise UpdateError("cross-products of no group")
        return {name: _products(arrays, name, n_genes) for name in sorted(groups)}

    # ---- asking ----

    def _ask(
        self,
        sites: Collection[str],
        content: RecordDict,
        message_type: str,
        parse: Callable[[RecordDict], Parsed],
    ) -> Iterable[tuple[str, Parsed]]:
        """Yield each site's answer; those that gave none are in the journal."""
        content[keys.STUDY] = study_record(self.study)
        request = Request(
            type=message_type, content=lambda: content, group=message_type
        )
        deadline_s = self.study.rounds.deadline_s
        for answer in ask(self.line, sites, request, deadline_s=deadline_s):
            site = answer.site
            if answer.content is None:
                self._report(site, answer.state, str(answer.reason))
                continue
            try:
                parsed = parse(answer.content)
            except (KeyError, UpdateError) as error:
                self._report(site, "quarantined", f"the reply cannot be used: {error}")
                continue
            finally:
                del answer
            yield site, parsed

    def _report(self, who: str, state: str, reason: str) -> None:
        logger.warning("%s state=%s reason=%s", who, state, reason)
        self.journal.write("not-answered", site=who, state=state, reason=reason)
        if self.deployment is not None and who not in self.present:
            self.absent[who] = {"state": state, "reason": reason}


def _same(content: RecordDict) -> RecordDict:
    return content


def _introduction(answer: RecordDict, floor: int) -> tuple[str, ConfigRecord]:
    """Return a site's name, which names files too, and all that it said of itself."""
    told = answer.config_records[keys.SITE]
    name, genes = text(told, keys.NAME), told[keys.GENES]
    if keys.NUM_PATIENTS in withheld(answer):
        patients = None
    else:
        patients = told[keys.NUM_PATIENTS]
    if not re.fullmatch(NAME_PATTERN, name):
        raise UpdateError("its name is not of lower-case letters, digits and hyphens")
    if patients is not None and (not isinstance(patients, int) or patients < floor):
        raise UpdateError(f"the site has fewer than {floor} patients")
    if not isinstance(genes, list) or not all(isinstance(gene, str) for gene in genes):
        raise UpdateError("its genes are no list of names")
    return name, told


def _moments(answer: RecordDict, n_genes: int) -> GeneMoments:
    arrays = to_arrays(answer.array_records[keys.MOMENTS])
    counts = _whole(arrays["count"])
    if counts.shape != (n_genes,):
        raise UpdateError(f"moments of shape {counts.shape}, expected ({n_genes},)")
    if keys.NUM_PATIENTS in withheld(answer):
        counted: Any = int(counts.max(initial=0))
    else:
        counted = answer.metric_records[keys.METRICS][keys.NUM_PATIENTS]
    if not isinstance(counted, int):
        raise UpdateError(f'"{keys.NUM_PATIENTS}" is no whole number')
    return GeneMoments(
        count=counts,
        total=arrays["total"].astype(np.float64),
        square_total=arrays["square-total"].astype(np.float64),
        n_patients=counted,
    )


def _products(
    arrays: Mapping[str, NDArray[Any]], group: str, n_genes: int
) -> CrossProducts:
    products = unpack(arrays[f"{group}/products"].astype(np.float64))
    if products.shape != (n_genes, n_genes):
        raise UpdateError(f"cross-products of {len(products)}, not of {n_genes} genes")
    return CrossProducts(
        products=products,
        pair_counts=unpack(_whole(arrays[f"{group}/pair-counts"])),
        totals=arrays[f"{group}/totals"].astype(np.float64),
    )


def _whole(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Return counts that are of an integer type, as int64."""
    if counts.dtype.kind not in "iu":
        raise UpdateError(f"counts are of type {counts.dtype}, expected whole numbers")
    return counts.astype(np.int64)


def _total(numbers: Iterable[int | None]) -> int | None:
    """Return the sum, or None where a number is withheld."""
    every = list(numbers)
    return None if None in every else sum(n for n in every if n is not None)
