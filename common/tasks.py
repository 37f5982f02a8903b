"""Which modules each phase trains, under which names, and which of them travel.

    phase            modules
    pretraining      backbone
    classification   classification.encoder, classification.head
    survival         survival.encoder, survival.head

Fine-tuning starts from the pretrained encoder. A tuned encoder is a copy of its own, so
that no task spoils restoration or another task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedgex.common import model, start
from fedgex.common.model import Encoder, GexBert
from fedgex.common.models.heads import ClassificationHead, SurvivalHead
from fedgex.common.parameters import load_parameters, parameters
from fedgex.common.seeds import seeded
from fedgex.common.statistics import CrossProducts
from fedgex.common.study import (
    CLASSIFICATION,
    PRETRAINING,
    SURVIVAL,
    Classification,
    LocalTraining,
    Study,
    Survival,
)

BACKBONE = "backbone"
FIXED = ".encoder.linear."
"""In the names of what is computed once and never trained: the linear start."""
Modules = dict[str, nn.Module]
Parameters = Mapping[str, NDArray[np.float32]]


def build(study: Study, n_genes: int, phase: str) -> Modules:
    """Return the modules of a phase, initialised by the study's seed alone."""
    config = model.preset(
        study.preset,
        n_genes,
        study.linear_rank,
        max(len(study.linear_types), 1),
        study.network_where,
    )
    with seeded(study.seed, "initial", phase):
        if phase == PRETRAINING:
            return {BACKBONE: GexBert(config)}
        encoder = Encoder(config)
        if phase == CLASSIFICATION:
            classes = study.classification.classes
            classifier = ClassificationHead(config, len(classes))
            classifier.start_from(study.linear_types, classes)
            return {f"{phase}.encoder": encoder, f"{phase}.head": classifier}
        head = SurvivalHead(
            config, len(study.survival.cancer_types), len(study.survival.interval_ends)
        )
    return {f"{phase}.encoder": encoder, f"{phase}.head": head}


def initial(study: Study, n_genes: int) -> dict[str, NDArray[np.float32]]:
    """Return every parameter of a new model: the backbone, and the heads that travel.

    A fine-tuned encoder joins when its phase begins, see `begin`.
    """
    whole = parameters(build(study, n_genes, PRETRAINING))
    for phase in (CLASSIFICATION, SURVIVAL):
        settings = study.phases.get(phase)
        if settings is not None and "head" in _shared(settings):
            head = build(study, n_genes, phase)[f"{phase}.head"]
            whole |= parameters({f"{phase}.head": head})
    return whole


def begin(
    study: Study, phase: str, whole: Parameters
) -> dict[str, NDArray[np.float32]]:
    """Return the whole model as a phase begins: a tuned encoder copies the backbone's.

    Parameters
    ----------
    whole
        Every parameter of the model so far, by name.
    """
    settings = study.phases[phase]
    if phase == PRETRAINING or "encoder" not in _shared(settings):
        return dict(whole)
    own = f"{phase}.encoder."
    if any(name.startswith(own) for name in whole):
        return dict(whole)
    return dict(whole) | _renamed(whole, f"{BACKBONE}.encoder.", own)


def sent(study: Study, phase: str, whole: Parameters) -> dict[str, NDArray[np.float32]]:
    """Return what a site needs for a phase: what travels, and a frozen encoder."""
    if phase == PRETRAINING:
        return {k: v for k, v in whole.items() if k.startswith(f"{BACKBONE}.")}
    own = {k: v for k, v in whole.items() if k.startswith(f"{phase}.")}
    if any(name.startswith(f"{phase}.encoder.") for name in own):
        return own
    return own | _renamed(whole, f"{BACKBONE}.encoder.", f"{phase}.encoder.")


def travelling(study: Study, phase: str) -> tuple[str, ...]:
    """Return the names of the modules whose parameters travel up in a phase."""
    if phase == PRETRAINING:
        return (BACKBONE,)
    return tuple(f"{phase}.{part}" for part in _shared(study.phases[phase]))


def updated(
    study: Study, phase: str, arrays: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Return those of `arrays` that a site sends back: trained, and not local."""
    up = tuple(f"{name}." for name in travelling(study, phase))
    return {
        name: array
        for name, array in arrays.items()
        if name.startswith(up) and FIXED not in name
    }


def linear_start(
    study: Study, groups: Mapping[str, CrossProducts]
) -> dict[str, NDArray[np.float32]]:
    """Return the linear start's parameters; empty if the study leaves it out.

    Parameters
    ----------
    groups
        Cross-products pooled over the sites, see `start.pool_completed`.
    """
    if not study.linear_rank:
        return {}
    found = start.fit(groups, study.linear_types, study.linear_rank)
    return {f"{BACKBONE}{FIXED}{name}": array for name, array in found.items()}


def load(study: Study, n_genes: int, phase: str, whole: Parameters) -> Modules:
    """Return a phase's modules with the parameters of a whole model, on the CPU.

    Raises
    ------
    UpdateError
        If the model lacks a parameter of the phase, such as a head that stayed local.
    """
    modules = build(study, n_genes, phase)
    load_parameters(modules, sent(study, phase, whole))
    return modules


def _shared(settings: LocalTraining) -> tuple[str, ...]:
    """Return which of encoder and head travel in a fine-tuning phase."""
    if not isinstance(settings, Classification | Survival):
        raise AssertionError("only fine-tuning has a head")
    encoder = ("encoder",) if settings.backbone == "tuned" else ()
    head = ("head",) if settings.head == "shared" else ()
    return encoder + head


def _renamed(whole: Parameters, old: str, new: str) -> dict[str, NDArray[np.float32]]:
    return {
        new + name.removeprefix(old): array
        for name, array in whole.items()
        if name.startswith(old)
    }
