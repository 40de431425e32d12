"""The options of each loss, as users write them under [loss] and as `fastpref.losses` takes them.

Everything that lists losses or describes one derives from the classes here. Nothing here imports torch.
"""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field, Strict
from pydantic.dataclasses import dataclass

from fastpref.names import LOSS_TITLES

Variant = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
SORTING_VARIANTS = ("aot", "aot_unpaired")
SMOOTHED_VARIANTS = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")
MARGIN_VARIANTS = ("sigmoid", "hinge", "exo_pair", "robust")
"""DPO's losses of x = βΔ alone, from which the margin of a pair is subtracted."""

# Strict by field: a dataclass that is strict as a whole would refuse the table of a config.
loss_table = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
Number = Annotated[float, Strict()]
Positive = Annotated[float, Strict(), Field(gt=0)]
NonNegative = Annotated[float, Strict(), Field(ge=0)]
Smoothing = Annotated[float, Strict(), Field(ge=0, lt=0.5)]


class Loss:
    """The properties of a loss that other packages read. The options of each loss override those that differ."""

    suits: ClassVar[str]
    """The data and needs that the loss suits, to choose a loss by."""
    uses_reference: ClassVar[bool] = True
    """True if the loss compares the policy with a reference model."""
    paired: ClassVar[bool] = True
    """Whether an example has several completions, usually two; otherwise it is a single one, labelled for KTO."""
    listwise: ClassVar[bool] = False
    """Whether an example is a list of completions with scores, all of which the loss ranks; a pair is a list of two."""
    supervised: ClassVar[bool] = False
    """Whether an example is a single completion without a label, which the policy is to imitate."""

    @property
    def title(self) -> str:
        """The name as people write it, such as "SimPO"."""
        return LOSS_TITLES[self.type]  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def unit(self) -> str:
        """What one example is, in messages: "pair", "list" or "completion"."""
        return "list" if self.listwise else "pair" if self.paired else "completion"

    @property
    def margin(self) -> float:
        """The margin of the examples that have none of their own."""
        return 0.0

    @property
    def no_margins(self) -> str:
        """The reason why examples may have no margin of their own, or an empty string if they may."""
        return "a margin is between the two completions of a pair"

    @property
    def no_weights(self) -> str:
        """The reason why examples may have no weight of their own, or an empty string if they may."""
        return ""


@dataclass(frozen=True, kw_only=True, config=loss_table)
class DPO(Loss):
    """Direct preference optimization and its variants, named as in TRL; the loss is Σ weight · mean(variant)."""

    type: Literal["dpo"] = "dpo"
    """Selects the loss."""
    beta: Positive = 0.1
    """Sets how strongly the policy is kept near the reference."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = ("sigmoid",)
    """Names the losses to add up."""
    weights: tuple[Number, ...] | None = None
    """Gives each variant a weight; by default all are 1."""
    label_smoothing: Smoothing = 0.0
    """Sets the assumed share of flipped labels, for sigmoid, exo_pair, robust, aot and aot_unpaired."""
    f_divergence: Divergence = "reverse_kl"
    """Chooses the divergence that the losses of a difference use; reverse_kl is the log-ratio."""
    f_alpha: Number = 0.5
    """Sets the coefficient of f_divergence = "alpha"."""
    length_alpha: Annotated[float, Strict(), Field(ge=0, le=1)] = 1.0
    """Weighs the tokens beyond the length of the shorter completion (LD-DPO)."""
    weighting: Annotated[bool, Strict()] = False
    """Weighs pairs by how likely the policy itself is to write them (WPO)."""
    discopop_tau: Positive = 0.05
    """Sets the temperature of discopop."""
    suits: ClassVar[str] = "pairs, and memory for a second forward pass a step"

    def __post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != len(self.variants):
            raise ValueError(f"weights has {len(self.weights)} entries, variants has {len(self.variants)}")
        if len(set(self.variants)) != len(self.variants):
            raise ValueError(f"variants names a loss twice: {', '.join(self.variants)}")
        if self.label_smoothing and "ipo" in self.variants:
            raise ValueError("label_smoothing has no effect on ipo; set it to 0")
        if "exo_pair" in self.variants and not self.label_smoothing:
            raise ValueError("variants: exo_pair needs label_smoothing above 0, such as 1e-3")
        if self.weighting and set(self.variants) & set(SORTING_VARIANTS):
            raise ValueError("weighting cannot go with aot or aot_unpaired, which compare different pairs")

    @property
    def sorts_step(self) -> bool:
        """Whether a variant sorts the pairs of the whole step, and so needs all of them before any gradient."""
        return bool(set(self.variants) & set(SORTING_VARIANTS))

    @property
    def no_margins(self) -> str:
        others = [name for name in self.variants if name not in (*MARGIN_VARIANTS, "sft")]
        if not others and self.variants != ("sft",):
            return ""
        which = f"variant{'s' * (len(others) > 1)} {' and '.join(others or self.variants)}"
        return f"none is defined for the {which}, only for {', '.join(MARGIN_VARIANTS)} and for sft beside them"

    @property
    def no_weights(self) -> str:
        names = [name for name in self.variants if name in SORTING_VARIANTS]
        return f"{' and '.join(names)} sort the pairs of the step, so that no term belongs to one pair" if names else ""


@dataclass(frozen=True, kw_only=True, config=loss_table)
class IPO(Loss):
    """Identity preference optimization: `dpo` with `variants = ["ipo"]`, under its own name."""

    type: Literal["ipo"] = "ipo"
    """Selects the loss."""
    beta: Positive = 0.1
    """Sets τ of the paper: the target margin is 1/(2·beta) per token."""
    suits: ClassVar[str] = "pairs with few or deterministic labels, on which DPO overfits"

    def as_dpo(self) -> DPO:
        return DPO(beta=self.beta, variants=("ipo",))

    @property
    def no_margins(self) -> str:
        return "its target, 1/(2·beta) per token, is a margin already"


@dataclass(frozen=True, kw_only=True, config=loss_table)
class KTO(Loss):
    """Kahneman-Tversky optimization of single completions that are labelled good or bad."""

    type: Literal["kto"] = "kto"
    """Selects the loss."""
    beta: Positive = 0.1
    """Sets how strongly the policy is kept near the reference."""
    desirable_weight: NonNegative = 1.0
    """Weighs the rows that are labelled true."""
    undesirable_weight: NonNegative = 1.0
    """Weighs the rows that are labelled false."""
    kl: Literal["batch", "none"] = "batch"
    """Chooses what rewards are compared with: the KL estimate of the batch, or 0 ("none", which is unpaired APO-
    zero)."""
    suits: ClassVar[str] = "single completions marked good or bad"
    paired: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, config=loss_table)
class ORPO(Loss):
    """Odds ratio preference optimization: supervised learning plus an odds ratio, without a reference."""

    type: Literal["orpo"] = "orpo"
    """Selects the loss."""
    beta: NonNegative = 0.1
    """Weighs the odds ratio (λ in the paper)."""
    nll_on: Literal["completion", "all"] = "completion"
    """Chooses what the supervised term scores: the chosen completion, or the prompt too (as the paper's code and TRL
    do)."""
    suits: ClassVar[str] = "pairs, a base model, and no separate supervised stage"
    uses_reference: ClassVar[bool] = False

    @property
    def no_margins(self) -> str:
        return "it compares odds, not rewards"


@dataclass(frozen=True, kw_only=True, config=loss_table)
class SimPO(Loss):
    """Simple preference optimization: length-normalized rewards and a target margin, without a reference."""

    type: Literal["simpo"] = "simpo"
    """Selects the loss."""
    beta: Positive = 2.0
    """Scales the average log-probability."""
    gamma: Number | None = None
    """Sets the target margin γ; the default is 0.5 · beta."""
    gamma_beta_ratio: Number | None = None
    """Sets the target margin as γ/beta, in place of gamma."""
    label_smoothing: Smoothing = 0.0
    """Sets the assumed share of flipped labels."""
    sft_weight: NonNegative = 0.0
    """Weighs the mean negative log-likelihood of the chosen completion."""
    alpha: Number = 0.0
    """Shapes the reward as in AlphaPO; 0 is the log-probability."""
    suits: ClassVar[str] = "pairs, and the least memory and time"
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError("gamma and gamma_beta_ratio both set the target margin; remove one of them")

    @property
    def margin(self) -> float:
        if self.gamma is not None:
            return self.gamma
        return self.beta * (0.5 if self.gamma_beta_ratio is None else self.gamma_beta_ratio)

    @property
    def no_margins(self) -> str:
        return ""


@dataclass(frozen=True, kw_only=True, config=loss_table)
class CPO(Loss):
    """Contrastive preference optimization: DPO with a uniform reference, plus supervised learning."""

    type: Literal["cpo"] = "cpo"
    """Selects the loss."""
    beta: Positive = 0.1
    """Scales the log-probability."""
    variant: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Chooses the loss of the difference; "ipo" takes averages per token."""
    label_smoothing: Smoothing = 0.0
    """Sets the assumed share of flipped labels, for sigmoid only."""
    sft_weight: NonNegative = 1.0
    """Weighs the mean negative log-likelihood of the chosen completion."""
    alpha: Number = 0.0
    """Shapes the reward as in AlphaPO; 0 is the log-probability."""
    suits: ClassVar[str] = "pairs whose chosen side is worth imitating"
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.label_smoothing and self.variant != "sigmoid":
            raise ValueError(f"label_smoothing has no effect on variant = {self.variant!r}; set it to 0")

    @property
    def no_margins(self) -> str:
        return "the target of its variant ipo, 1/(2·beta) per token, is a margin already" * (self.variant == "ipo")


@dataclass(frozen=True, kw_only=True, config=loss_table)
class PL(Loss):
    """Plackett-Luce DPO: the likelihood of the whole ranking of three or more completions to a prompt."""

    type: Literal["pl"] = "pl"
    """Selects the loss."""
    beta: Positive = 0.1
    """Sets how strongly the policy is kept near the reference."""
    suits: ClassVar[str] = "several completions to each prompt, in an order that can be trusted"
    listwise: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True, config=loss_table)
class LiPO(Loss):
    """LiPO-λ: the logistic loss of all pairs of a list, each weighted by its effect on the quality of the ranking."""

    type: Literal["lipo"] = "lipo"
    """Selects the loss."""
    beta: Positive = 0.1
    """Sets how strongly the policy is kept near the reference."""
    suits: ClassVar[str] = "several completions to each prompt, with scores whose differences matter"
    listwise: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True, config=loss_table)
class SFT(Loss):
    """Supervised fine-tuning: the mean negative log-likelihood of the completions' tokens, without preferences."""

    type: Literal["sft"] = "sft"
    """Selects the loss."""
    suits: ClassVar[str] = "completions to imitate, before preferences or without them"
    uses_reference: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    supervised: ClassVar[bool] = True
    beta: ClassVar[float] = 0.0
    """There are no rewards."""


LossOptions = DPO | IPO | KTO | ORPO | SimPO | CPO | PL | LiPO | SFT
LOSSES: dict[str, type[LossOptions]] = {options.type: options for options in get_args(LossOptions)}
"""The losses by the names that `loss.type` takes."""


def compares_neighbours(loss: LossOptions, rows: int) -> bool:
    """Return whether a step of `rows` rows also pairs each prompt with the completion of the next row, for KTO's KL."""
    return isinstance(loss, KTO) and loss.kl == "batch" and rows > 1


def title_of(loss: str) -> str:
    """Return the name of a type of loss as people write it: "SimPO" for "simpo"."""
    return LOSS_TITLES[loss]
