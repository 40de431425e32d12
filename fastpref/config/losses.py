"""The options of each loss, as users write them under [loss] and as `fastpref.losses` takes them.

Everything that lists losses or describes one derives from the classes here. Nothing here imports torch.
"""

from dataclasses import KW_ONLY
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field, Strict
from pydantic.dataclasses import dataclass

Variant = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
SORTING_VARIANTS = ("aot", "aot_unpaired")

# Strict by field: a dataclass that is strict as a whole would refuse the table of a config.
loss_table = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
Number = Annotated[float, Strict()]
Positive = Annotated[float, Strict(), Field(gt=0)]
NonNegative = Annotated[float, Strict(), Field(ge=0)]
Smoothing = Annotated[float, Strict(), Field(ge=0, lt=0.5)]


class Loss:
    """What the rest of the package asks of a loss; the options of each loss override what differs."""

    suits: ClassVar[str]
    """Which data and needs the loss suits, to choose by."""
    uses_reference: ClassVar[bool] = True
    """Whether the loss compares with a reference model."""
    paired: ClassVar[bool] = True
    """Whether an example is a pair of responses; otherwise it is a single response with a label."""

    @property
    def unit(self) -> str:
        """What one example is, in messages: "pair" or "response"."""
        return "pair" if self.paired else "response"


@dataclass(frozen=True, config=loss_table)
class DPO(Loss):
    """Direct preference optimisation and its relatives (names as in TRL); the loss is Σ weight · mean(variant)."""

    _: KW_ONLY
    type: Literal["dpo"] = "dpo"
    """Which loss."""
    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = ("sigmoid",)
    """Which losses to add up."""
    weights: tuple[Number, ...] | None = None
    """One weight a variant; all 1 if left out."""
    label_smoothing: Smoothing = 0.0
    """How often labels are taken to be flipped; used by sigmoid, exo_pair, robust, aot and aot_unpaired."""
    f_divergence: Divergence = "reverse_kl"
    """What replaces the log-ratio in the losses of a difference."""
    f_alpha: Number = 0.5
    """The coefficient of f_divergence = "alpha"."""
    length_alpha: Annotated[float, Strict(), Field(ge=0, le=1)] = 1.0
    """LD-DPO: the weight of tokens past the shorter response's length."""
    weighting: Annotated[bool, Strict()] = False
    """WPO: weigh pairs by how likely the policy itself is to write them."""
    discopop_tau: Positive = 0.05
    """The temperature of discopop's blend."""
    suits: ClassVar[str] = "pairs, and memory for a second forward pass a step"

    def __post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != len(self.variants):
            raise ValueError(f"weights has {len(self.weights)} entries, variants has {len(self.variants)}")
        if len(set(self.variants)) != len(self.variants):
            raise ValueError(f"variants names a loss twice: {', '.join(self.variants)}")
        if self.label_smoothing and "ipo" in self.variants:
            raise ValueError("label_smoothing has no meaning for ipo; set it to 0")
        if "exo_pair" in self.variants and not self.label_smoothing:
            raise ValueError("variants: exo_pair needs label_smoothing above 0, such as 1e-3")
        if self.weighting and set(self.variants) & set(SORTING_VARIANTS):
            raise ValueError("weighting cannot go with aot or aot_unpaired, which compare different pairs")

    @property
    def sorts_step(self) -> bool:
        """Whether a variant compares pairs of the whole step with each other."""
        return bool(set(self.variants) & set(SORTING_VARIANTS))


@dataclass(frozen=True, config=loss_table)
class IPO(Loss):
    """Identity preference optimisation: `dpo` with `variants = ["ipo"]`, under its own name."""

    _: KW_ONLY
    type: Literal["ipo"] = "ipo"
    """Which loss."""
    beta: Positive = 0.1
    """The paper's τ: the margin aimed at is 1/(2·beta) per token."""
    suits: ClassVar[str] = "pairs with few or deterministic labels, on which DPO overfits"

    def as_dpo(self) -> DPO:
        return DPO(beta=self.beta, variants=("ipo",))


@dataclass(frozen=True, config=loss_table)
class KTO(Loss):
    """Kahneman-Tversky optimisation of single responses labelled good or bad."""

    _: KW_ONLY
    type: Literal["kto"] = "kto"
    """Which loss."""
    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: NonNegative = 1.0
    """The weight of rows labelled true."""
    undesirable_weight: NonNegative = 1.0
    """The weight of rows labelled false."""
    kl: Literal["batch", "none"] = "batch"
    """The point rewards are compared with: the batch's KL estimate, or 0 ("none": APO-zero, unpaired)."""
    suits: ClassVar[str] = "single responses marked good or bad"
    paired: ClassVar[bool] = False


@dataclass(frozen=True, config=loss_table)
class ORPO(Loss):
    """Odds ratio preference optimisation: supervised learning plus an odds ratio, without a reference."""

    _: KW_ONLY
    type: Literal["orpo"] = "orpo"
    """Which loss."""
    beta: NonNegative = 0.1
    """The weight of the odds ratio (λ in the paper)."""
    nll_on: Literal["response", "all"] = "response"
    """What the supervised term scores: the chosen response, or the prompt too (the paper's code, TRL)."""
    suits: ClassVar[str] = "pairs, a base model, and no separate supervised stage"
    uses_reference: ClassVar[bool] = False


@dataclass(frozen=True, config=loss_table)
class SimPO(Loss):
    """Simple preference optimisation: length-normalised rewards and a target margin, without a reference."""

    _: KW_ONLY
    type: Literal["simpo"] = "simpo"
    """Which loss."""
    beta: Positive = 2.0
    """The scale of the average log-probability."""
    gamma: Number | None = None
    """The target margin γ; 0.5 · beta if neither it nor gamma_beta_ratio is given."""
    gamma_beta_ratio: Number | None = None
    """The target margin as γ/beta, instead of gamma."""
    label_smoothing: Smoothing = 0.0
    """How often labels are taken to be flipped."""
    sft_weight: NonNegative = 0.0
    """The weight of the chosen response's mean negative log-likelihood."""
    alpha: Number = 0.0
    """AlphaPO: the shape of the reward; 0 is the log-probability."""
    suits: ClassVar[str] = "pairs, and the least memory and time"
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError("gamma and gamma_beta_ratio say the same thing; give one of them")

    @property
    def margin(self) -> float:
        if self.gamma is not None:
            return self.gamma
        return self.beta * (0.5 if self.gamma_beta_ratio is None else self.gamma_beta_ratio)


@dataclass(frozen=True, config=loss_table)
class CPO(Loss):
    """Contrastive preference optimisation: DPO with a uniform reference, plus supervised learning."""

    _: KW_ONLY
    type: Literal["cpo"] = "cpo"
    """Which loss."""
    beta: Positive = 0.1
    """The scale of the log-probability."""
    variant: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of the difference; "ipo" takes averages per token."""
    label_smoothing: Smoothing = 0.0
    """How often labels are taken to be flipped; sigmoid only."""
    sft_weight: NonNegative = 1.0
    """The weight of the chosen response's mean negative log-likelihood."""
    alpha: Number = 0.0
    """AlphaPO: the shape of the reward; 0 is the log-probability."""
    suits: ClassVar[str] = "pairs whose chosen side is worth imitating"
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.label_smoothing and self.variant != "sigmoid":
            raise ValueError(f"label_smoothing has no meaning for variant = {self.variant!r}; set it to 0")


LossOptions = DPO | IPO | KTO | ORPO | SimPO | CPO
LOSSES: dict[str, type[LossOptions]] = {options.type: options for options in get_args(LossOptions)}
"""The losses by the names that `loss.type` takes."""


def compares_neighbours(loss: LossOptions, rows: int) -> bool:
    """Return whether a step of `rows` rows also pairs each prompt with the response of the next row, for KTO's KL."""
    return isinstance(loss, KTO) and loss.kl == "batch" and rows > 1
