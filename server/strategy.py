"""From a round's accepted updates to the next model.

Means and order statistics are ours (per gene, streamed from disk, in order of site
name); the adaptive server optimisers are Flower's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedYogi
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedgex.common import keys
from fedgex.common.arrays import PER_GENE, Arrays
from fedgex.common.errors import UpdateError
from fedgex.common.study import SitePrivacy, StrategyRule
from fedgex.server import aggregation
from fedgex.server.aggregation import Array
from fedgex.server.privacy import noised


@dataclass(frozen=True, kw_only=True)
class Update:
    """One site's accepted update, its arrays on disk."""

    site: str
    path: Path
    """Safetensors file of the arrays that travelled."""
    num_examples: int | None
    """None if the site withholds it."""
    num_loss_terms: int | None
    """None if the site withholds it."""
    measured: NDArray[np.bool_]
    """Genes of the vocabulary that the site measures, shape (V,)."""

    def read(self, name: str) -> Array:
        """Read one array."""
        return Spooled(self.path)[name]


class Spooled(Mapping[str, Array]):
    """The arrays of a spooled update, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises
        ------
        UpdateError
            If it does not hold arrays in safetensors' format.
        """
        self.path = path
        try:
            with safe_open(path, framework="numpy") as file:
                self._names = sorted(file.keys())
        except SafetensorError as error:
            raise UpdateError("the arrays cannot be read") from error

    def __getitem__(self, name: str) -> Array:
        """Read one array."""
        if name not in self._names:
            raise KeyError(name)
        try:
            with safe_open(self.path, framework="numpy") as file:
                array: Array = file.get_tensor(name)
        except Exception as error:  # such as a number format that NumPy has not
            raise UpdateError(f"{name} cannot be read") from error
        return array

    def __contains__(self, name: object) -> bool:
        """Return whether there is an array of this name."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        """Return the names, sorted."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._names)


def combine(
    rule: StrategyRule,
    incoming: Mapping[str, Array],
    updates: list[Update],
    server_round: int,
    server_state: Arrays,
    site_privacy: SitePrivacy | None = None,
) -> tuple[dict[str, Array], dict[str, NDArray[np.generic]]]:
    """Return the next parameters and the server optimiser's next state.

    Parameters
    ----------
    incoming
        Parameters that the round began with: exactly those that travel.
    updates
        Accepted updates, one or more; their order does not matter.
    server_round
        Number of the round in its phase, from 1.
    server_state
        What this function returned for the round before; empty at first.
    site_privacy
        Puts noise on the mean, before a server optimiser sees it.

    Raises
    ------
    UpdateError
        If the weights are fixed and a site has none.
    """
    updates = sorted(updates, key=lambda update: update.site)
    mean = {
        name: _combine_one(rule, name, array, updates)
        for name, array in sorted(incoming.items())
    }
    return step(
        rule, incoming, mean, len(updates), server_round, server_state, site_privacy
    )


def step(
    rule: StrategyRule,
    incoming: Mapping[str, Array],
    mean: Mapping[str, Array],
    n_sites: int,
    server_round: int,
    server_state: Arrays,
    site_privacy: SitePrivacy | None,
) -> tuple[dict[str, Array], dict[str, NDArray[np.generic]]]:
    """Return what `combine` does, given the mean over `n_sites` sites."""
    mean = dict(mean)
    if site_privacy is not None:
        mean = noised(mean, site_privacy, n_sites)
    if rule.name in ("fedadam", "fedyogi"):
        return _adapt(rule, incoming, mean, server_round, server_state)
    return mean, {}


def _combine_one(
    rule: StrategyRule, name: str, incoming: Array, updates: list[Update]
) -> Array:
    by_gene = rule.per_gene and name.endswith(PER_GENE)
    weights = [
        np.asarray(_weight(rule, update) * (update.measured if by_gene else 1.0))
        for update in updates
    ]

    def arrays() -> Iterator[Array]:
        for update in updates:
            array = update.read(name)
            yield incoming + array if rule.update == "delta" else array

    if rule.name == "median":
        return aggregation.median(arrays(), weights, incoming)
    if rule.name == "trimmed-mean":
        return aggregation.trimmed_mean(arrays(), weights, incoming, rule.trim_share)
    return aggregation.weighted_mean(arrays(), weights, incoming)


def _weight(rule: StrategyRule, update: Update) -> float:
    if rule.weights == "fixed":
        if update.site not in rule.site_weights:
            raise UpdateError(
                f'site "{update.site}" has no fixed weight; expected one of '
                f"{', '.join(sorted(rule.site_weights))}. Name it in "
                "strategy.site_weights of the study."
            )
        return rule.site_weights[update.site]
    told = {"patients": update.num_examples, "loss-terms": update.num_loss_terms}
    if rule.weights not in told:
        return 1.0
    weight = told[rule.weights]
    assert weight is not None, "a round quarantines an update without its weight"
    return float(weight)


def _adapt(
    rule: StrategyRule,
    incoming: Mapping[str, Array],
    mean: Mapping[str, Array],
    server_round: int,
    server_state: Arrays,
) -> tuple[dict[str, Array], dict[str, NDArray[np.generic]]]:
    """Take one step of FedAdam or FedYogi (Reddi et al. 2021) towards the mean.

    Flower's class does the step; it is handed the mean as its only reply, and its
    float64 result is cast back to the parameters' own type.
    """
    chosen = FedAdam if rule.name == "fedadam" else FedYogi
    strategy = chosen(
        eta=rule.server_learning_rate,
        beta_1=rule.beta_1,
        beta_2=rule.beta_2,
        tau=rule.tau,
    )
    strategy.current_arrays = dict(incoming)
    strategy.m_t = _part("first", server_state)
    strategy.v_t = _part("second", server_state)
    content = RecordDict(
        {
            keys.MODEL: ArrayRecord({name: FlowerArray(mean[name]) for name in mean}),
            keys.METRICS: MetricRecord({keys.NUM_EXAMPLES: 1}),
        }
    )
    reply = Message(content, dst_node_id=1, message_type=keys.TRAIN)
    arrays, _ = strategy.aggregate_train(server_round, [reply])
    if arrays is None or strategy.m_t is None or strategy.v_t is None:
        raise AssertionError("Flower aggregates one valid reply")
    new = {name: arrays[name].numpy().astype(incoming[name].dtype) for name in incoming}
    state: dict[str, NDArray[np.generic]] = {}
    for prefix, moments in (("first", strategy.m_t), ("second", strategy.v_t)):
        state |= {f"{prefix}/{name}": array for name, array in moments.items()}
    return new, state


def _part(prefix: str, state: Arrays) -> dict[str, NDArray[np.generic]] | None:
    part = {
        name.removeprefix(f"{prefix}/"): array
        for name, array in state.items()
        if name.startswith(f"{prefix}/")
    }
    return part or None
