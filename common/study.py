"""What all sites of a federation agree on before it starts: the study.

A study is written as TOML, checked once, hashed, and sent with every message; a site
refuses one that differs from the hash beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from fedgex.common.data.cross_products import OTHERS
from fedgex.common.data.scales import Scale
from fedgex.common.settings import Name, Noise, Norm, Rate, Settings, added, retired

PRETRAINING, CLASSIFICATION, SURVIVAL = "pretraining", "classification", "survival"
"""Names of the phases, which are the tasks that a site permits."""

FEWEST_SUMMED = 3
"""Fewest updates in any secure sum: of two, each site sees the other's."""

MEANS = {
    "fedavg": ("x̄ = Σ w_s x_s / Σ w_s", "McMahan et al. 2017, arXiv 1602.05629"),
    "fedprox": (
        "as `fedavg`; sites minimise loss + μ/2 · ‖x_s - x‖², μ = `proximal_mu`",
        "Li et al. 2020, arXiv 1812.06127",
    ),
    "fedadam": (
        "Δ = x̄ - x; m ← β₁m + (1-β₁)Δ; v ← β₂v + (1-β₂)Δ²; x + η_t · m / (√v + τ), "
        "with η_t = η √(1-β₂^(t+1)) / (1-β₁^(t+1))",
        "Reddi et al. 2021, arXiv 2003.00295",
    ),
}
"""Aggregation rules that need no more than the mean of the updates, by name: the next
model, in the symbols of docs/rounds.md, and the paper."""
ROBUST = {
    "trimmed-mean": (
        "for each number: mean over sites without the ceil(`trim_share` · S) smallest "
        "and as many largest",
        "Yin et al. 2018, arXiv 1803.01498",
    ),
    "median": ("for each number: median over sites", "Yin et al. 2018, as above"),
}
"""Aggregation rules that need every update by itself, and know no weights."""

Symbol = Annotated[str, Field(pattern=r"^\S+$")]
Weight = Annotated[float, Field(gt=0, le=1e9)]
MOST_STEPS = 10_000_000  # private ones, of all planned rounds at a site
Head = Annotated[
    Literal["shared"],
    retired(
        "local",
        'set head = "shared", or leave it out. A model with local heads needs the '
        "release of fedgex that trained it",
    ),
]


def _aggregation_rule(name: str) -> str:
    if name not in (known := (*MEANS, *ROBUST)):
        raise ValueError(f"expected one of {', '.join(known)}")
    return name


class VocabularyRule(Settings):
    """Which genes the study is about."""

    min_share: float = Field(default=0.5, ge=0, le=1)
    """A gene enters if at least this share of the sites measures it; 1 means all."""
    min_patient_share: float = Field(default=0.5, gt=0, le=1)
    """A site measures a gene if at least this share of its samples has a value."""
    genes: tuple[Symbol, ...] = ()
    """Fixed genes of the study, in any order; empty: agreed among the sites."""
    max_unknown_share: float = added(0.2, ge=0, le=1)
    """Share of these genes of which no site needs to have a value; beyond, the run does
    not begin. The model restores none of them."""

    @model_validator(mode="after")
    def _distinct_genes(self) -> Self:
        _named_once(self.genes, "genes")
        return self


class MaskingRule(Settings):
    """Which cells are hidden in pretraining."""

    min_rate: float = Field(default=0.1, gt=0, lt=1)
    """Least share of the measured genes to hide."""
    max_rate: float = Field(default=0.95, gt=0, lt=1)
    """Greatest share; the rate is drawn evenly between the two for each batch."""
    mcar: float = Field(default=0.6, ge=0)
    """Weight of hiding completely at random: each measured cell with the same
    probability, by itself."""
    panel: float = Field(default=0.2, ge=0)
    """Weight of hiding entire genes, the same for every patient of a batch."""
    mnar: float = Field(default=0.2, ge=0)
    """Weight of low expression dropping out (missing not at random): the log-odds rise
    by 2 for each standard deviation down, with an intercept for each patient that keeps
    the mean probability at the rate."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each pattern by name; an added one only where it has any."""
        values = self.model_dump(exclude={"min_rate", "max_rate"})
        return {name: float(weight) for name, weight in values.items()}

    @model_validator(mode="after")
    def _weights_and_rates(self) -> Self:
        if self.min_rate > self.max_rate:
            raise ValueError("min_rate is above max_rate")
        if not any(self.weights.values()):
            raise ValueError(f"the weights of {', '.join(self.weights)} are all zero")
        return self


class LocalTraining(Settings):
    """How each site trains in one round."""

    rounds: int = Field(ge=0, le=100_000)
    """Rounds of the phase; 0 leaves it out."""
    local_epochs: int = Field(default=1, ge=1, le=10_000)
    """Passes over the site's patients in a round."""
    batch_size: int = Field(default=32, ge=1, le=1_000_000)
    """Patients in a batch."""
    learning_rate: Rate = 2e-3
    """Peak learning rate of AdamW (or SGD)."""
    final_learning_rate: float = Field(default=0.1, ge=1e-6, le=1)
    """Share of the peak that is left in the last round (cosine over the rounds)."""
    weight_decay: float = Field(default=0.01, ge=0, le=1e3)
    """Decoupled weight decay."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimiser; its state starts anew each round, so a site keeps nothing."""
    max_grad_norm: float = Field(default=1.0, ge=1e-6, le=1e9)
    """Gradients are scaled down to this Euclidean norm."""


class Pretraining(LocalTraining):
    """Masked restoration."""

    rounds: int = Field(default=30, ge=0, le=100_000)
    """Rounds of restoration pretraining."""
    masking: MaskingRule = MaskingRule()


def _named_once(types: tuple[str, ...], key: str) -> None:
    if len(set(types)) < len(types):
        raise ValueError(f"{key} must be distinct; one is named more than once")


class Classification(LocalTraining):
    """Cancer type from expression."""

    rounds: int = Field(default=0, ge=0, le=100_000)
    """Rounds; 0 leaves classification out."""
    classes: tuple[str, ...] = ()
    """Cancer types told apart; named here so that no site needs to reveal its own."""
    backbone: Literal["frozen", "tuned"] = "tuned"
    """`tuned`: a copy of the encoder learns the task and travels. `frozen`: the head
    learns alone, over the pretrained backbone."""
    head: Head = "shared"
    """The head travels, so that a hospital that never trained can predict."""
    min_genes: int = Field(default=8, ge=1)
    """Each batch shows a random panel of at least this many genes."""

    @model_validator(mode="after")
    def _at_least_two_classes(self) -> Self:
        _named_once(self.classes, "classes")
        if self.rounds and len(self.classes) < 2:
            raise ValueError("classification needs two or more distinct classes")
        return self


class Survival(LocalTraining):
    """Time to event within each cancer type."""

    rounds: int = Field(default=0, ge=0, le=100_000)
    """Rounds; 0 leaves survival out."""
    cancer_types: tuple[str, ...] = ()
    """Cancer types, each with a log-hazard of its own over the shared backbone."""
    loss: Literal["discrete-time", "cox"] = "discrete-time"
    """`discrete-time`: a sum over patients, fit for any site. `cox`: the partial
    likelihood, stratified by site and cancer type."""
    interval_ends: tuple[float, ...] = (182.5, 365.25, 730.5, 1095.75, 1826.25)
    """Ends of the follow-up intervals, days, for the discrete-time loss; what happens
    later counts as alive at the last end. Fixed here, so no site reveals its times."""
    backbone: Literal["frozen", "tuned"] = "frozen"
    """As for classification."""
    head: Head = "shared"
    """As for classification."""
    clinical: bool = False
    """Whether age and sex stand beside the expression."""

    @model_validator(mode="after")
    def _types_and_intervals(self) -> Self:
        _named_once(self.cancer_types, "cancer_types")
        if self.rounds and not self.cancer_types:
            raise ValueError("survival needs one or more cancer_types")
        ends = self.interval_ends
        if not ends or ends[0] <= 0 or list(ends) != sorted(set(ends)):
            raise ValueError("interval_ends must be positive and rising")
        return self


class StrategyRule(Settings):
    """How updates become one model."""

    name: Annotated[
        str,
        AfterValidator(_aggregation_rule),
        retired("fedyogi", 'set strategy.name = "fedadam", its nearest relative'),
    ]
    """Aggregation rule, by its name in docs/rounds.md. Without the section: fedavg."""
    weights: Literal["patients", "loss-terms", "equal", "fixed"] = "patients"
    """What a site's update counts by: `"patients"`, `"loss-terms"`, `"equal"` or
    `"fixed"`, see docs/rounds.md. Rules that need every update by itself know only
    `"equal"`."""
    site_weights: dict[Name, Weight] = Field(default={})
    """Weight of each site by name, above 0, for `weights = "fixed"`:
    `{ north = 2.0, south = 1.0 }`."""
    per_gene: bool = True
    """Average a gene's parameters over the sites that measured the gene, only."""
    proximal_mu: float = Field(default=0.0, ge=0, le=1e6)
    """FedProx: pull towards the incoming model (Li et al. 2020, eq. 2); above 0 for
    fedprox, 0 for all others."""
    server_learning_rate: Rate = 0.01
    """FedAdam: eta of Reddi et al. 2021, algorithm 2."""
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    """FedAdam: first moment."""
    beta_2: float = Field(default=0.99, ge=0, lt=1)
    """FedAdam: second moment."""
    tau: float = Field(default=1e-3, ge=1e-12, le=1e6)
    """FedAdam: degree of adaptivity."""
    trim_share: float = Field(default=0.2, ge=0, lt=0.5)
    """Trimmed mean: share of the sites cut off at either end, for each number."""
    update: Literal["parameters", "delta"] = "parameters"
    """What travels up: the trained `"parameters"`, or their change, the `"delta"`."""
    precision: Annotated[
        Literal["float32"],
        retired("float16", 'set strategy.precision = "float32", or leave it out'),
    ] = "float32"
    """Number format of what travels up. There is no other value."""

    @model_validator(mode="after")
    def _weights_and_pull_fit_the_name(self) -> Self:
        if self.name in ROBUST and self.weights != "equal":
            raise ValueError(
                f'{self.name} takes no weights; set weights = "equal" and say so'
            )
        if self.weights == "fixed" and not self.site_weights:
            raise ValueError('weights = "fixed" needs site_weights, one for each site')
        if self.weights != "fixed" and self.site_weights:
            raise ValueError('site_weights are for weights = "fixed" alone')
        if self.name == "fedprox" and self.proximal_mu == 0:
            raise ValueError("fedprox needs proximal_mu above 0")
        if self.name != "fedprox" and self.proximal_mu > 0:
            raise ValueError("proximal_mu is for fedprox alone")
        return self


class PatientPrivacy(Settings):
    """Patient-level differential privacy: DP-SGD at each site (Abadi et al. 2016).

    Neighbouring cohorts differ by one patient, added or removed.
    """

    epsilon: float | None = Field(default=None, gt=0, le=1e6)
    """Most that all planned rounds together may spend at a site."""
    noise_multiplier: Noise | None = None
    """Standard deviation of the noise as a multiple of `clip`; instead of `epsilon`."""
    delta: float = Field(gt=0, lt=1)
    """Probability that the bound does not hold; below 1 / patients at every site."""
    clip: Norm
    """Euclidean norm to which each patient's gradient is scaled down."""
    sample_rate: float = Field(ge=1e-6, le=1)
    """Probability with which each patient is in a step (Poisson sampling)."""
    label_noise: Noise = 10.0
    """Standard deviation of the noise on the number of patients of each class, which
    is counted once for classification."""
    accountant: Literal["prv", "rdp"] = "prv"
    """How the noise multiplier follows from `epsilon`."""

    @model_validator(mode="after")
    def _by_target_or_by_noise(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("expected either epsilon or noise_multiplier")
        return self


class SitePrivacy(Settings):
    """Site-level differential privacy: clipped at the sites, noise at the server.

    Neighbouring federations differ by one site (McMahan et al. 2018). The server is
    trusted with the noise.
    """

    noise_multiplier: Noise
    """Standard deviation of the noise on the sum, as a multiple of `clip`."""
    clip: Norm
    """Euclidean norm to which a site scales its change of the model down."""
    delta: float = Field(gt=0, lt=1)
    """Probability that the bound does not hold."""


class Privacy(Settings):
    """What of patients or sites can be told from what travels."""

    patient: PatientPrivacy | None = None
    """None: updates tell of patients whatever they tell."""
    site: SitePrivacy | None = None
    """None: the model tells of sites whatever it tells."""


class SecureAggregation(Settings):
    """The server sees the sum of the sites' updates alone (Bonawitz et al. 2017)."""

    clip: Norm = 100.0
    """Euclidean norm to which a site scales its change down; it bounds the fixed-point
    numbers."""


class PublicRule(Settings):
    """What comes from the server's public cohort, and so tells of no site's patient."""

    statistics: bool = False
    """Means, standard deviations and, with `linear_rank`, the factor model."""
    epochs: int = Field(default=0, ge=0, le=100_000)
    """Epochs of each phase on it before the phase's first round at the sites; of
    fine-tuning only where the head travels and 30 of its patients can take part."""


class RoundRule(Settings):
    """When a round counts."""

    quorum: int = Field(default=2, ge=1, le=10_000)
    """Fewest updates that make a round."""
    mandatory_sites: tuple[str, ...] = ()
    """Sites without which no round counts."""
    deadline_s: float = Field(default=3600, gt=0, le=12 * 3600)
    """A site is late once nothing of it has moved for so many seconds; Flower keeps a
    message for twelve hours."""
    max_norm_ratio: float = Field(default=10, ge=1, le=1e12)
    """An update that changes the model more than so many times as much as the median
    of the others does, in Euclidean norm, is quarantined; from three updates on."""


class Evaluation(Settings):
    """How, and how often, restoration is evaluated on the hold-out."""

    rates: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
    """Missing rates, completely at random and low-expression dropout."""
    panels: tuple[int, ...] = (50, 100, 200)
    """Whole-gene panels: numbers of genes that are measured."""
    patients_per_round: int = Field(default=128, ge=1, le=1_000_000_000)
    """Hold-out patients evaluated after every round; the last round takes all."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not all(0 < rate < 1 for rate in self.rates):
            raise ValueError("rates must lie between 0 and 1")
        if not all(size >= 1 for size in self.panels):
            raise ValueError("panels must be of one gene or more")
        return self


class Study(Settings):
    """Everything that the sites and the server of one federation agree on."""

    name: Name
    """Lower-case letters, digits and hyphens."""
    seed: int = Field(default=1, ge=0)
    """One seed; every other is derived from it by name."""
    scale: Scale = Scale.LOG2P1
    """Canonical expression scale, to which each site converts."""
    preset: Literal["tiny", "small", "base"] = "tiny"
    """Size of the model, see `gexbert.PRESETS`."""
    minimum_cohort: int = Field(default=10, ge=1)
    """Sites with fewer patients take no part, and smaller counts do not travel."""
    cross_products: bool = False
    """Ask the sites that permit it for cross-products (the linear references)."""
    linear_rank: int = Field(default=0, ge=0)
    """Rank of the factor model of the pooled cross-products; 0 leaves it out."""
    linear_types: tuple[str, ...] = ()
    """Cancer types that the factor model tells apart, each with a mean and covariance
    of its own, which the sites then send; empty: one for all patients."""
    network_where: Literal["everywhere", "dropout"] = "everywhere"
    """Where the network adds to the factor model: `everywhere`, or where low expression
    drops out, which the factor model takes for missing at random."""
    vocabulary: VocabularyRule = VocabularyRule()
    pretraining: Pretraining = Pretraining()
    classification: Classification = Classification()
    survival: Survival = Survival()
    strategy: StrategyRule = StrategyRule(name="fedavg")
    privacy: Privacy = Privacy()
    secure_aggregation: SecureAggregation | None = None
    """None: the server sees each site's update."""
    public: PublicRule = PublicRule()
    rounds: RoundRule = RoundRule()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not self.phases:
            raise ValueError("no phase has any rounds")
        if self.linear_rank and not (self.cross_products or self.public.statistics):
            raise ValueError(
                "linear_rank above 0 needs cross_products = true, or "
                "public.statistics = true"
            )
        _named_once(self.linear_types, "linear_types")
        if self.network_where == "dropout" and not self.linear_rank:
            raise ValueError('network_where = "dropout" is for linear_rank above 0')
        if self.linear_types and not self.linear_rank:
            raise ValueError("linear_types are for linear_rank above 0")
        if OTHERS in self.linear_types:
            raise ValueError(f'linear_types names "{OTHERS}", which all others are')
        if self.cross_products and self.public.statistics:
            raise ValueError(
                "with public.statistics = true no site is asked for statistics; set "
                "cross_products = false"
            )
        return self

    @model_validator(mode="after")
    def _privacy_holds(self) -> Self:
        if wrong := [*self._beside_patient(), *self._beside_sums()]:
            raise ValueError("; ".join(wrong))
        return self

    def _beside_patient(self) -> Iterator[str]:
        """Yield what cannot stand beside patient-level privacy."""
        rule = self.privacy.patient
        if rule is None:
            return
        epochs = sum(each.rounds * each.local_epochs for each in self.phases.values())
        if (steps := epochs / rule.sample_rate) > MOST_STEPS:
            yield f"privacy.patient: {steps:.3g} steps; expected {MOST_STEPS:,} or less"
        if self.strategy.weights not in ("equal", "fixed"):
            yield (
                f'privacy.patient: weights = "{self.strategy.weights}" counts patients;'
                ' set strategy.weights = "equal" or "fixed"'
            )
        if self.cross_products or not self.public.statistics:
            yield (
                "privacy.patient: sums over patients may not travel; set "
                "cross_products = false and public.statistics = true"
            )
        if "survival" in self.phases and self.survival.loss == "cox":
            yield (
                "privacy.patient: the Cox partial likelihood is no sum over patients, "
                "so that no patient's part of it can be clipped; set "
                'survival.loss = "discrete-time"'
            )

    def _beside_sums(self) -> Iterator[str]:
        """Yield what cannot stand where only a sum is seen, or noise is put on one."""
        named = {
            "privacy.site": self.privacy.site,
            "secure_aggregation": self.secure_aggregation,
        }
        rule = self.strategy
        for name, chosen in named.items():
            if chosen is None:
                continue
            if rule.name in ROBUST:
                yield f"{name}: {rule.name} needs every update by itself; use a mean"
            if rule.update != "delta":
                yield f'{name}: set strategy.update = "delta"'
            if rule.weights not in ("equal", "fixed"):
                yield f'{name}: set strategy.weights = "equal" or "fixed"'
        if self.secure_aggregation is not None and self.rounds.quorum < FEWEST_SUMMED:
            yield f"secure_aggregation: set rounds.quorum to {FEWEST_SUMMED} or more"
        if self.privacy.site is not None:
            if rule.weights != "equal":
                yield 'privacy.site: a site must count by 1; set weights = "equal"'
            if rule.per_gene:
                yield "privacy.site: set strategy.per_gene = false"
            if not self.public.statistics:
                yield (
                    "privacy.site: the pooled statistics would stand in the model "
                    "without noise; set public.statistics = true"
                )

    @property
    def phases(self) -> dict[str, LocalTraining]:
        """Phases in their order, those without rounds left out."""
        phases = {
            PRETRAINING: self.pretraining,
            CLASSIFICATION: self.classification,
            SURVIVAL: self.survival,
        }
        return {name: phase for name, phase in phases.items() if phase.rounds}

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical form."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
