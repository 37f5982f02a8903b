"""The model of each phase, its parameters' names, and which are down- and uploaded.

    phase            model           names
    pretraining      GexBert         backbone.*
    classification   Classifier      classification.encoder.*, classification.head.*
    survival         SurvivalModel   survival.encoder.*, survival.head.*

Fine-tuning starts from the pretrained encoder; a tuned encoder is a copy of it, so that
no task degrades restoration or another task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedgex.common.data.cross_products import CrossProducts
from fedgex.common.models import factor_model
from fedgex.common.models.gexbert import Encoder, GexBert, ModelConfig, preset
from fedgex.common.models.heads import ClassificationHead, SurvivalHead
from fedgex.common.models.parameters import load_parameters, parameters
from fedgex.common.seeds import seeded
from fedgex.common.study import (
    CLASSIFICATION,
    PRETRAINING,
    SURVIVAL,
    Study,
)

BACKBONE = "backbone"
FIXED = ".encoder.linear."
"""Part of the names of the factor model's parameters, which are never trained."""
Parameters = Mapping[str, NDArray[np.float32]]


class Classifier(nn.Module):
    """Cancer type from expression."""

    def __init__(self, encoder: Encoder, head: ClassificationHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head


class SurvivalModel(nn.Module):
    """Log-hazard and survival from expression."""

    def __init__(self, encoder: Encoder, head: SurvivalHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head


PhaseModel = GexBert | Classifier | SurvivalModel
Built = TypeVar("Built", bound=GexBert | Classifier | SurvivalModel)


def build(study: Study, n_genes: int, phase: str) -> PhaseModel:
    """Return a phase's model, initialised from the study's seed."""
    return _NEW[phase](study, n_genes)


def new_backbone(study: Study, n_genes: int) -> GexBert:
    """Return a backbone, initialised from the study's seed."""
    with seeded(study.seed, "initial", PRETRAINING):
        return GexBert(_config(study, n_genes))


def new_classifier(study: Study, n_genes: int) -> Classifier:
    """Return a classifier, initialised from the study's seed."""
    config, classes = _config(study, n_genes), study.classification.classes
    with seeded(study.seed, "initial", CLASSIFICATION):
        encoder = Encoder(config)
        head = ClassificationHead(config, len(classes))
        head.start_from(study.linear_types, classes)
    return Classifier(encoder, head)


def new_survival(study: Study, n_genes: int) -> SurvivalModel:
    """Return a survival model, initialised from the study's seed."""
    config, rule = _config(study, n_genes), study.survival
    with seeded(study.seed, "initial", SURVIVAL):
        encoder = Encoder(config)
        head = SurvivalHead(config, len(rule.cancer_types), len(rule.interval_ends))
    return SurvivalModel(encoder, head)


_NEW: dict[str, Callable[[Study, int], PhaseModel]] = {
    PRETRAINING: new_backbone,
    CLASSIFICATION: new_classifier,
    SURVIVAL: new_survival,
}


def named(phase: str, model: PhaseModel) -> dict[str, nn.Module]:
    """Return a phase's model under the prefix of its parameters' names."""
    return {BACKBONE if phase == PRETRAINING else phase: model}


def initial(study: Study, n_genes: int) -> dict[str, NDArray[np.float32]]:
    """Return every parameter of a new model: the backbone and the heads.

    A fine-tuned encoder joins when its phase begins, see `begin`.
    """
    state_dict = parameters({BACKBONE: new_backbone(study, n_genes)})
    for phase, new in ((CLASSIFICATION, new_classifier), (SURVIVAL, new_survival)):
        if phase in study.phases:
            state_dict |= parameters({f"{phase}.head": new(study, n_genes).head})
    return state_dict


def begin(
    study: Study, phase: str, state_dict: Parameters
) -> dict[str, NDArray[np.float32]]:
    """Return the model as a phase begins: a tuned encoder copies the backbone's.

    Parameters
    ----------
    state_dict
        Every parameter of the model so far, by name.
    """
    if not is_tuned(study, phase):
        return dict(state_dict)
    own = f"{phase}.encoder."
    if any(name.startswith(own) for name in state_dict):
        return dict(state_dict)
    return dict(state_dict) | _renamed(state_dict, f"{BACKBONE}.encoder.", own)


def download_state(
    study: Study, phase: str, state_dict: Parameters
) -> dict[str, NDArray[np.float32]]:
    """Return what a site downloads in a phase: its model, with a frozen encoder."""
    if phase == PRETRAINING:
        return {k: v for k, v in state_dict.items() if k.startswith(f"{BACKBONE}.")}
    own = {k: v for k, v in state_dict.items() if k.startswith(f"{phase}.")}
    if any(name.startswith(f"{phase}.encoder.") for name in own):
        return own
    return own | _renamed(state_dict, f"{BACKBONE}.encoder.", f"{phase}.encoder.")


def uploaded_modules(study: Study, phase: str) -> tuple[str, ...]:
    """Return the names of the modules whose parameters are uploaded in a phase."""
    if phase == PRETRAINING:
        return (BACKBONE,)
    parts = ("encoder", "head") if is_tuned(study, phase) else ("head",)
    return tuple(f"{phase}.{part}" for part in parts)


def is_tuned(study: Study, phase: str) -> bool:
    """Return whether a fine-tuning phase has an encoder of its own, which it trains."""
    backbones = {
        CLASSIFICATION: study.classification.backbone,
        SURVIVAL: study.survival.backbone,
    }
    return backbones.get(phase) == "tuned"


def upload_state(
    study: Study, phase: str, arrays: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Return those of `arrays` that a site uploads, which are those trained."""
    up = tuple(f"{name}." for name in uploaded_modules(study, phase))
    return {
        name: array
        for name, array in arrays.items()
        if name.startswith(up) and FIXED not in name
    }


def mixture(
    study: Study, groups: Mapping[str, CrossProducts]
) -> dict[str, NDArray[np.float32]]:
    """Return the factor model's parameters; empty if the study leaves it out.

    Parameters
    ----------
    groups
        Cross-products pooled over the sites, see `factor_model.pool_completed`.
    """
    if not study.linear_rank:
        return {}
    found = factor_model.fit(groups, study.linear_types, study.linear_rank)
    return {f"{BACKBONE}{FIXED}{name}": array for name, array in found.items()}


def load(study: Study, n_genes: int, phase: str, state_dict: Parameters) -> PhaseModel:
    """Return a phase's model with its part of the state dict, on the CPU.

    Raises
    ------
    UpdateError
        If a parameter of the phase is missing.
    """
    return _loaded(study, phase, state_dict, build(study, n_genes, phase))


def load_backbone(study: Study, n_genes: int, state_dict: Parameters) -> GexBert:
    """Return the backbone, see `load`."""
    return _loaded(study, PRETRAINING, state_dict, new_backbone(study, n_genes))


def load_classifier(study: Study, n_genes: int, state_dict: Parameters) -> Classifier:
    """Return the classifier, see `load`."""
    return _loaded(study, CLASSIFICATION, state_dict, new_classifier(study, n_genes))


def load_survival(study: Study, n_genes: int, state_dict: Parameters) -> SurvivalModel:
    """Return the survival model, see `load`."""
    return _loaded(study, SURVIVAL, state_dict, new_survival(study, n_genes))


def _loaded(study: Study, phase: str, state_dict: Parameters, model: Built) -> Built:
    load_parameters(named(phase, model), download_state(study, phase, state_dict))
    return model


def _config(study: Study, n_genes: int) -> ModelConfig:
    return preset(
        study.preset,
        n_genes,
        study.linear_rank,
        max(len(study.linear_types), 1),
        study.network_where,
    )


def _renamed(
    state_dict: Parameters, old: str, new: str
) -> dict[str, NDArray[np.float32]]:
    return {
        new + name.removeprefix(old): array
        for name, array in state_dict.items()
        if name.startswith(old)
    }
