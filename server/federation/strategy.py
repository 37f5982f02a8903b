"""Aggregate a round's accepted updates into the next global parameters.

A rule is a class that follows `Strategy`, its entry in `MEANS` or `ROBUST`, and its
name in the tuple of that name in `study`. Arrays are streamed from disk, in order of
site name, so that the order of arrival changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedgex.common.arrays import PER_GENE, Arrays
from fedgex.common.errors import UpdateError
from fedgex.common.federation import Update
from fedgex.common.study import SitePrivacy, StrategyRule
from fedgex.server.federation import aggregation
from fedgex.server.federation.aggregation import Array, Weight
from fedgex.server.federation.central_noise import noised

Parameters = Mapping[str, Array]
"""Parameters that are exchanged, by name."""
Aggregated = tuple[dict[str, Array], dict[str, NDArray[np.generic]]]
"""The next parameters, and the state for the next round; empty for most rules."""
Statistic = Callable[[Iterator[Array], Sequence[Weight], Array], Array]
"""Of the sites' arrays, their weights, and the array of the global parameters."""


class Spooled(Mapping[str, Array]):
    """The arrays of a spooled update, read on access."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises
        ------
        UpdateError
            If the file is not in the safetensors format.
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
        """Return the number of arrays."""
        return len(self._names)


class Strategy(Protocol):
    """Interface of an aggregation rule."""

    def aggregate(
        self,
        global_parameters: Parameters,
        updates: Sequence[Update],
        server_round: int,
        state: Arrays,
    ) -> Aggregated:
        """Aggregate a round's updates into the next parameters.

        Parameters
        ----------
        global_parameters
            Parameters that the round began with.
        updates
            Accepted updates, one or more, in order of site name.
        server_round
            Number of the round in its phase, from 1.
        state
            State that the previous round returned, from the checkpoint; empty at the
            start of each phase.
        """
        ...


@dataclass(frozen=True)
class FedAvg:
    """Weighted mean of the updates (McMahan et al. 2017).

    FedProx too (Li et al. 2020), whose proximal term is in the sites' loss.
    """

    rule: StrategyRule
    site_privacy: SitePrivacy | None = None
    """Noise on the mean, before the server optimiser; None for none."""

    def aggregate(
        self,
        global_parameters: Parameters,
        updates: Sequence[Update],
        server_round: int,
        state: Arrays,
    ) -> Aggregated:
        """Average the updates, then proceed as `from_mean`."""
        mean = _each(self.rule, global_parameters, updates, aggregation.weighted_mean)
        return self.from_mean(
            global_parameters, mean, len(updates), server_round, state
        )

    def from_mean(
        self,
        global_parameters: Parameters,
        mean: Parameters,
        n_sites: int,
        server_round: int,
        state: Arrays,
    ) -> Aggregated:
        """Return the next parameters, given the mean over `n_sites` sites."""
        if self.site_privacy is not None:
            mean = noised(mean, self.site_privacy, n_sites)
        return self.step(global_parameters, mean, server_round, state)

    def step(
        self,
        global_parameters: Parameters,
        mean: Parameters,
        server_round: int,
        state: Arrays,
    ) -> Aggregated:
        """Take the mean as the next parameters."""
        return dict(mean), {}


class FedAdam(FedAvg):
    """A step of Adam towards the mean (Reddi et al. 2021, algorithm 2).

    The learning rate is bias-corrected as by Kingma & Ba (2014), for a count of rounds
    that begins at 2, as Flower does it.
    """

    def step(
        self,
        global_parameters: Parameters,
        mean: Parameters,
        server_round: int,
        state: Arrays,
    ) -> Aggregated:
        """Move the parameters along the first moment, scaled by the second."""
        beta_1, beta_2 = self.rule.beta_1, self.rule.beta_2
        rate = self.rule.server_learning_rate * np.sqrt(
            1 - np.power(beta_2, server_round + 1.0)
        )
        rate /= 1 - np.power(beta_1, server_round + 1.0)
        new: dict[str, Array] = {}
        moments: dict[str, NDArray[np.generic]] = {}
        for name, x in global_parameters.items():
            delta = mean[name] - x
            first: Any = state.get(f"first/{name}", np.zeros_like(x))
            second: Any = state.get(f"second/{name}", np.zeros_like(x))
            m = beta_1 * first + (1 - beta_1) * delta
            v = beta_2 * second + (1 - beta_2) * delta**2
            moved = x + rate * m / (np.sqrt(v) + self.rule.tau)
            new[name] = moved.astype(x.dtype)  # `rate` made it float64
            moments |= {f"first/{name}": m, f"second/{name}": v}
        return new, moments


@dataclass(frozen=True)
class OrderStatistic:
    """Trimmed mean or median over the sites (Yin et al. 2018)."""

    rule: StrategyRule
    statistic: Statistic

    def aggregate(
        self,
        global_parameters: Parameters,
        updates: Sequence[Update],
        server_round: int,
        state: Arrays,
    ) -> Aggregated:
        """Apply the statistic to each number by itself."""
        return _each(self.rule, global_parameters, updates, self.statistic), {}


def _trimmed_mean(rule: StrategyRule) -> Strategy:
    trimmed = partial(aggregation.trimmed_mean, trim_share=rule.trim_share)
    return OrderStatistic(rule, trimmed)


MEANS = {"fedavg": FedAvg, "fedprox": FedAvg, "fedadam": FedAdam}
ROBUST: dict[str, Callable[[StrategyRule], Strategy]] = {
    "trimmed-mean": _trimmed_mean,
    "median": lambda rule: OrderStatistic(rule, aggregation.median),
}
"""Rules by name; `study` lists the same names."""


def combine(
    rule: StrategyRule,
    global_parameters: Parameters,
    updates: Sequence[Update],
    server_round: int,
    state: Arrays,
    site_privacy: SitePrivacy | None = None,
) -> Aggregated:
    """Aggregate by the rule of a study; the order of the updates does not matter.

    See `Strategy.aggregate` for the parameters.

    Raises
    ------
    UpdateError
        If the weights are fixed and a site has none.
    """
    strategy: Strategy
    if rule.name in MEANS:
        strategy = MEANS[rule.name](rule, site_privacy)
    else:
        strategy = ROBUST[rule.name](rule)
    updates = sorted(updates, key=lambda update: update.site)
    return strategy.aggregate(global_parameters, updates, server_round, state)


def step(
    rule: StrategyRule,
    global_parameters: Parameters,
    mean: Parameters,
    n_sites: int,
    server_round: int,
    state: Arrays,
    site_privacy: SitePrivacy | None,
) -> Aggregated:
    """Continue `combine` from the mean over `n_sites` sites."""
    strategy = MEANS[rule.name](rule, site_privacy)
    return strategy.from_mean(global_parameters, mean, n_sites, server_round, state)


def _each(
    rule: StrategyRule,
    global_parameters: Parameters,
    updates: Sequence[Update],
    statistic: Statistic,
) -> dict[str, Array]:
    """Apply a statistic over the sites to each parameter."""

    def arrays(name: str) -> Iterator[Array]:
        for update in updates:
            array = update.arrays[name]
            yield global_parameters[name] + array if rule.update == "delta" else array

    def weights(name: str) -> list[Weight]:
        by_gene = rule.per_gene and name.endswith(PER_GENE)
        return [
            np.asarray(_weight(rule, update) * (update.measured if by_gene else 1.0))
            for update in updates
        ]

    return {
        name: statistic(arrays(name), weights(name), array)
        for name, array in sorted(global_parameters.items())
    }


def _weight(rule: StrategyRule, update: Update) -> float:
    if rule.weights == "fixed":
        if update.site not in rule.site_weights:
            raise UpdateError(
                f'site "{update.site}" has no fixed weight; expected one of '
                f"{', '.join(sorted(rule.site_weights))}. Name it in "
                "strategy.site_weights of the study."
            )
        return rule.site_weights[update.site]
    reported = {"patients": update.num_examples, "loss-terms": update.num_loss_terms}
    if rule.weights not in reported:
        return 1.0
    weight = reported[rule.weights]
    assert weight is not None, "a round quarantines an update without its weight"
    return float(weight)
