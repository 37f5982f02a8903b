"""Initialise a run: sites, vocabulary, standardisation and the first checkpoint.

    (contract) -> prepare -> statistics -> (cross-products) -> first checkpoint

A site with an unusable reply is left out of that step, and one on a foreign scale out
of the run; the journal records the reason. Arithmetic is in common/federation.py.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from flwr.app import RecordDict
from safetensors.numpy import load_file, save

from fedgex.common import federation, keys
from fedgex.common.data.cohort import Cohort
from fedgex.common.data.cross_products import MIN_SITES, OTHERS, CrossProducts
from fedgex.common.data.dataset import to_patients
from fedgex.common.data.moments import GeneMoments, Standardisation, pool
from fedgex.common.data.vocabulary import Vocabulary
from fedgex.common.errors import FederationError, UpdateError
from fedgex.common.messages.codec import boundary
from fedgex.common.messages.fields import Introduction
from fedgex.common.messages.replies import (
    CrossProductsReply,
    PrepareReply,
    StatisticsReply,
    pack_products,
    unpack_products,
)
from fedgex.common.messages.requests import (
    CrossProductsRequest,
    PrepareRequest,
    StatisticsRequest,
    StudyRequest,
)
from fedgex.common.models import factor_model
from fedgex.common.models.checkpoint import Checkpoint
from fedgex.common.system.files import explained, read_json, write_atomic
from fedgex.server.federation.dispatch import request_all
from fedgex.server.federation.participants import (
    CONTRIBUTED,
    Channel,
    Request,
    SiteOutcome,
)
from fedgex.server.federation.rounds import Site, require_quorum
from fedgex.server.settings import ServerSettings

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")


@dataclass(kw_only=True)
class Initialization:
    """Connects the sites of a run, and collects what the first round needs."""

    channel: Channel
    settings: ServerSettings
    public_cohort: Cohort | None
    """None if the study uses none, or the run has a checkpoint already."""
    present: dict[str, Introduction] = field(init=False, default_factory=dict)
    """Introduction of each site, in order of name."""
    absent: dict[str, SiteOutcome] = field(init=False, default_factory=dict)
    """Outcomes of the named sites that do not participate."""
    failed: dict[str, SiteOutcome] = field(init=False, default_factory=dict)
    """`absent`, and the outcomes of nodes without a name."""

    def __post_init__(self) -> None:
        """Take the study from the participants."""
        self.participants = self.channel.participants
        self.study = self.participants.study

    def connect(self) -> None:
        """Wait for the sites, and request each one's name and panel.

        Raises
        ------
        FederationError
            Without a quorum, or without a mandatory site.
        """
        deadline_s = self.settings.start_deadline_s
        invited = self.participants.invite(self.channel, deadline_s)
        for site, outcome in invited.items():
            if not outcome.contributed:
                self._report(site, outcome)
        ready = [site for site, outcome in invited.items() if outcome.contributed]
        request = PrepareRequest(study=self.study)
        answers = self._request_all(ready, request, keys.PREPARE, self._introduction)
        for _, introduction in answers:
            self.present[introduction.name] = introduction
        self.present = dict(sorted(self.present.items()))
        self._require_quorum()
        if (path := self._kept("foreign-scales.json")).exists():
            self._leave_out(read_json(path, "what was found when the run began"))

    def sites(self, vocabulary: Vocabulary) -> list[Site]:
        """Return the present sites with their measured genes."""
        panels = {name: set(each.genes) for name, each in self.present.items()}
        return [
            Site(
                name=name,
                measured=np.array([gene in panels[name] for gene in vocabulary.genes]),
                n_patients=introduction.num_patients,
            )
            for name, introduction in self.present.items()
        ]

    def initial_checkpoint(self) -> Checkpoint:
        """Return the initial checkpoint: vocabulary, standardisation, parameters.

        Raises
        ------
        UpdateError
            If no site sends statistics.
        FederationError
            If the study asks for cross-products and fewer than two sites send them, or
            too few sites are left without those on a foreign scale.
        ConfigError
            If the public cohort lacks genes of the study.
        """
        study, public, groups = self.study, self.public_cohort, None
        names: list[str] = []
        if public is not None and study.public.statistics:
            vocabulary = self._vocabulary(public)
            scale = federation.public_standardisation(public, vocabulary)
            if study.linear_rank:
                patients = to_patients(public, vocabulary)
                least = federation.MIN_PUBLIC_PATIENTS
                groups = federation.cross_products(study, patients, least, scale)
        else:
            vocabulary, scale, names = self._statistics()
            federation.refuse_unknown(study, vocabulary, scale)
            if study.cross_products:
                groups = self._cross_products(vocabulary, scale)
        if groups is not None:
            path = self.settings.run_dir / "covariance.safetensors"
            write_atomic(path, save({"covariance": pool(groups.values()).covariance()}))
        return federation.initial_model(
            study,
            vocabulary,
            scale,
            groups=groups,
            public=public,
            contributors={
                name: self.present[name].num_patients if name in self.present else None
                for name in names
            },
        )

    def _vocabulary(self, public: Cohort | None = None) -> Vocabulary:
        panels = {name: site.genes for name, site in self.present.items()}
        return federation.agree_vocabulary(self.study, panels, public)

    # ---- the sites ----

    def _introduction(self, site: str, content: RecordDict) -> Introduction:
        introduction = PrepareReply.from_records(content).site
        patients, min_cell_count = introduction.num_patients, self.study.minimum_cohort
        if patients is not None and patients < min_cell_count:
            raise UpdateError(f"the site has fewer than {min_cell_count} patients")
        self.participants.admit(site, introduction.name)
        return introduction

    def _require_quorum(self) -> None:
        here = dict.fromkeys(self.present, CONTRIBUTED)
        invited = len(self.participants.expected) or self.settings.n_sites
        rule = self.study.rounds
        outcomes = {**self.failed, **self.absent, **here}
        require_quorum(outcomes, rule, "the start", invited=invited)

    # ---- statistics ----

    def _statistics(self) -> tuple[Vocabulary, Standardisation, list[str]]:
        """Pool the moments, once per run; return also the sites that sent them.

        Cached: requests contain these values, and sites cache replies by the digest of
        the request.
        """
        path = self._kept("start.safetensors")
        if path.exists():
            return self._read_start(path)
        vocabulary = self._vocabulary()

        def read(site: str, content: RecordDict) -> GeneMoments:
            moments = StatisticsReply.from_records(content).moments
            if moments.count.shape != (len(vocabulary),):
                shape = moments.count.shape
                raise UpdateError(f"moments of shape {shape}, not ({len(vocabulary)},)")
            return moments

        request = StatisticsRequest(study=self.study, vocabulary=vocabulary)
        moments = dict(self._request_all(self.present, request, keys.STATISTICS, read))
        foreign = federation.foreign_sites(self.study, moments)
        write_atomic(self._kept("foreign-scales.json"), json.dumps(foreign).encode())
        self._leave_out(foreign)
        moments = {n: each for n, each in moments.items() if n not in foreign}
        scale, names = federation.standardisation(moments), sorted(moments)
        about = {"vocabulary": vocabulary.genes, "sites": names}
        write_atomic(path.with_suffix(".json"), json.dumps(about).encode())
        write_atomic(path, save({"mean": scale.mean, "sd": scale.sd}))
        return vocabulary, scale, names

    def _read_start(self, path: Path) -> tuple[Vocabulary, Standardisation, list[str]]:
        """Read what `_statistics` kept; 0.1.0 kept no names of genes and sites."""
        kept, about = load_file(path), {}
        scale = Standardisation(mean=kept["mean"], sd=kept["sd"])
        if (names := path.with_suffix(".json")).exists():
            about = read_json(names, "the genes and sites of the statistics")
        vocabulary = self._vocabulary()
        if "vocabulary" in about:
            vocabulary = Vocabulary(tuple(about["vocabulary"]))
        elif len(vocabulary) != len(scale.mean):
            raise FederationError(
                f"the run began with {len(scale.mean)} genes, and the sites that are "
                f"present now agree on {len(vocabulary)}. Begin a new run, or resume "
                "with the sites of before."
            )
        return vocabulary, scale, about.get("sites", list(self.present))

    def _leave_out(self, foreign: Mapping[str, float]) -> None:
        """Exclude sites on a foreign scale, given each one's ratio to the others."""
        left = [name for name in foreign if self.present.pop(name, None) is not None]
        for name in left:
            reason = (
                f"the means of its genes are {foreign[name]:.2f} times the other "
                f"sites', expected about 1 where all are on the {self.study.scale} "
                "scale; have it correct data.scale, or its export, and begin a new run"
            )
            outcome = SiteOutcome(state="quarantined", reason=reason)
            self._report(name, outcome)
            self.absent[name] = outcome
        if left:
            self._require_quorum()

    def _kept(self, name: str) -> Path:
        """Return the path of a result that is computed once per run of this study."""
        path = self.settings.run_dir / name
        return path.with_stem(f"{path.stem}-{self.study.hash[:16]}")

    def _cross_products(
        self, vocabulary: Vocabulary, scale: Standardisation
    ) -> dict[str, CrossProducts]:
        """Pool the cross-products of the sites that permit it, by cancer type.

        Genes that a site lacks are completed, see `factor_model.pool_completed`.
        """
        spool, permitted = self.settings.run_dir / "spool", {*self.study.linear_types}

        def to_disk(site: str, content: RecordDict) -> Path:
            groups = CrossProductsReply.from_records(content).products
            if unknown := set(groups) - permitted - {OTHERS}:
                raise UpdateError(
                    f"cross-products of {len(unknown)} groups that the study does not "
                    "name"
                )
            if not groups:
                raise UpdateError("cross-products of no group")
            sizes = {len(sums.totals) for sums in groups.values()}
            if sizes != {len(vocabulary)}:
                raise UpdateError(
                    f"cross-products of {sorted(sizes)} genes, not of {len(vocabulary)}"
                )
            path = spool / f"{len(list(spool.iterdir()))}.safetensors"
            with explained(path):
                path.write_bytes(save(pack_products(groups)))
            return path

        spool.mkdir(exist_ok=True)
        request = CrossProductsRequest(
            study=self.study, vocabulary=vocabulary, standardisation=scale
        )
        kind = keys.CROSS_PRODUCTS
        by_site = dict(self._request_all(self.present, request, kind, to_disk))
        if len(by_site) < MIN_SITES:
            raise FederationError(
                f"the study asks for cross-products and {len(by_site)} sites sent "
                f"them, expected {MIN_SITES} or more, so that no site's sums are "
                "visible; set share_cross_products = true at more sites, or "
                "cross_products = false in the study."
            )

        def sites() -> Iterator[dict[str, CrossProducts]]:
            for name in sorted(by_site):
                yield unpack_products(load_file(by_site[name]))

        study = self.study
        pooled = factor_model.pool_completed(
            sites, study.linear_types, study.linear_rank
        )
        shutil.rmtree(spool)
        return pooled

    # ---- requests ----

    def _request_all(
        self,
        sites: Collection[str],
        message: StudyRequest,
        kind: str,
        read: Callable[[str, RecordDict], Parsed],
    ) -> Iterator[tuple[str, Parsed]]:
        """Yield each site's parsed reply; failures go to the journal."""
        request = Request(type=kind, message=lambda: message, group=kind)
        deadline_s = self.study.rounds.deadline_s
        for answer in request_all(self.channel, sites, request, deadline_s=deadline_s):
            site, outcome = answer.site, answer.outcome
            if answer.content is not None:
                try:
                    with boundary("the reply cannot be used: "):
                        found = read(site, answer.content)
                except UpdateError as error:
                    outcome = SiteOutcome(state="quarantined", reason=str(error))
            del answer
            if outcome.contributed:
                yield site, found
            else:
                self._report(site, outcome)

    def _report(self, site: str, outcome: SiteOutcome) -> None:
        state, reason = outcome.state, str(outcome.reason)
        logger.warning("%s state=%s reason=%s", site, state, reason)
        journal = self.channel.journal
        journal.write("not-answered", site=site, state=state, reason=reason)
        if site in self.present:
            return
        self.failed[site] = outcome
        if site in self.participants.expected:
            self.absent[site] = outcome
