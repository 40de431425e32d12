"""The language-model head: its weight, and how the model scales and caps its logits."""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from fastpref.errors import UserError, one_line
from fastpref.kernels.head_weight import FourBitWeight, HeadWeight, OffloadedWeight
from fastpref.kernels.linear_logprob_naive import NaiveLogprobs, naive_logprobs
from fastpref.model.adapters.token_rows import token_head
from fastpref.model.body import around_body
from fastpref.model.precision import in_float32, is_finite
from fastpref.model.streaming.tables import computes_on
from fastpref.ops import LoraWeight, TokenLogprobs, computing_dtype, linear_logprob, read_as

_ROUNDINGS = 4  # of a logit by half a unit: of the product, and of the scale and the softcap after it; and of the sum


@dataclass(frozen=True)
class LogitSettings:
    """The settings of logits = softcap(scale · (hidden·Wᵀ + b))."""

    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LogitSettings":
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(getattr(config, "final_logit_softcapping", None), float(scale))


class Head(nn.Module):
    """A model's output layer, with or without PEFT's wrappers, as a weight and a bias for the fused kernels."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        module = model.get_output_embeddings()
        if module is None:
            kind = model.config.model_type
            raise UserError(f"{kind} models have no language-model head; a causal language model is needed")
        self.module = module
        self.settings = LogitSettings.of(model)

    def forward(
        self, hidden: Tensor, positions: Tensor, targets: Tensor, outputs: tuple[str, ...] = ()
    ) -> TokenLogprobs:
        """Return the log-probabilities of the targets [N], with the named outputs of `linear_logprob`.

        `positions` [N] is the row of hidden [M, H] that predicts each target.
        """
        dtype = computing_dtype(hidden)
        weight, bias = self.weight_and_bias(dtype)
        options: dict[str, Any] = {"softcap": self.settings.softcap, "logit_scale": self.settings.scale}
        return linear_logprob(
            hidden.to(dtype), read_as(weight, dtype), targets, bias, positions=positions, outputs=outputs, **options
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return all logits, float32 [*, V], of hidden [*, H], for callers that need whole distributions."""
        logits = self.module(hidden).float()
        scale, cap = self.settings.scale, self.settings.softcap
        logits = logits if scale == 1 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def weight_and_bias(
        self, dtype: torch.dtype | None = None
    ) -> tuple[Tensor | HeadWeight | LoraWeight, Tensor | None]:
        """Return the weight [V, H] with the active adapter, and the bias [V] or None. 4 bits are read as `dtype`."""
        module = self.module
        if isinstance(module, TrainableTokensWrapper):
            return token_head(module), None
        if isinstance(module, ModulesToSaveWrapper):
            active = module.active_adapters
            saved = not module.disable_adapters and active and active[0] in module.modules_to_save
            module = module.modules_to_save[active[0]] if saved else module.original_module
        tuned = isinstance(module, BaseTunerLayer)
        base = module.get_base_layer() if tuned else module
        weight, bias = _plain(base, dtype), getattr(base, "bias", None)
        if tuned and not module.disable_adapters and not module.merged:
            return _with_lora(module, weight), bias
        return weight, bias

    @property
    def vocabulary(self) -> int:
        base: Any = self.module.get_base_layer() if isinstance(self.module, BaseTunerLayer) else self.module
        base = base.original_module if isinstance(base, ModulesToSaveWrapper | TrainableTokensWrapper) else base
        return base.num_embeddings if isinstance(base, nn.Embedding) else base.out_features


def _plain(module: Any, dtype: torch.dtype | None) -> Tensor | HeadWeight:
    if getattr(module.weight, "quant_state", None) is not None:  # bitsandbytes' Params4bit
        return FourBitWeight.of(module.weight, dtype)
    if isinstance(module, nn.Linear | nn.Embedding) and module.weight.is_floating_point():
        device = computes_on(module)
        return module.weight if device is None else OffloadedWeight(module.weight, device)
    raise UserError(
        f"the head is a {type(module).__name__}, which is not known here; a linear layer is, plain, in 4 bits, trained "
        "or with a LoRA adapter"
    )


def _with_lora(module: Any, weight: Tensor | HeadWeight) -> Tensor | HeadWeight | LoraWeight:
    """Return the weight with PEFT's adapter. Raises UserError for variants of LoRA and for several adapters."""
    active = [name for name in module.active_adapters if name in getattr(module, "lora_A", {})]
    if not active:
        return weight
    if module.lora_variant or any(module.lora_B[name].bias is not None for name in active):
        kind = "this variant of LoRA (DoRA, or LoRA with a bias)"
        raise UserError(f"the head cannot have {kind}; take plain LoRA on lm_head, or leave it out of lora.target")
    *below, name = active
    dropout = None if isinstance(module.lora_dropout[name], nn.Identity) else module.lora_dropout[name]
    a, b, scaling = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    if below:  # a sum of adapters is one adapter of their ranks together
        if dropout is not None:
            raise UserError("the head cannot have dropout on an adapter that is stacked on another; set it to 0")
        a = torch.cat([*(module.lora_A[other].weight * (module.scaling[other] / scaling) for other in below), a])
        b = torch.cat([*(module.lora_B[other].weight for other in below), b], dim=1)
    return LoraWeight(weight, a, b, scaling, dropout)


class OwnLogits(nn.Module):
    """A head that runs the model's own code, for a model whose logits `LogitSettings` cannot describe.

    Only some rows of logits exist at a time, [n, V] in float32; the backward pass computes them again.
    """

    _ELEMENTS = 1 << 26  # logits that exist at once

    def __init__(self, model: PreTrainedModel, body: nn.Module):
        super().__init__()
        self.model = model
        self._body = [body]  # in a list, so that it is not registered a second time: the model contains it

    def forward(
        self, hidden: Tensor, positions: Tensor, targets: Tensor, outputs: tuple[str, ...] = ()
    ) -> TokenLogprobs:
        """Return what `Head.forward` returns."""

        def logprobs(hidden: Tensor, targets: Tensor) -> NaiveLogprobs:
            return naive_logprobs(self.logits(hidden), targets)

        rows = max(1, self._ELEMENTS // self.vocabulary)
        parts = zip(hidden[positions].split(rows), targets.split(rows), strict=True)
        columns = zip(*(checkpoint(logprobs, *part, use_reentrant=False) for part in parts), strict=True)
        whole: Any = NaiveLogprobs(*map(torch.cat, columns))
        return TokenLogprobs(whole.logp, **{name: getattr(whole, name).detach() for name in outputs})

    def logits(self, hidden: Tensor) -> Tensor:
        """Return all logits, float32 [N, V], of hidden [N, H]."""
        return around_body(self.model, self._body[0], _Returned(last_hidden_state=hidden[None])).logits[0].float()

    @property
    def vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size


class _Returned(BaseModelOutputWithPast):
    """A body's output that returns None for every other attribute that a model's forward reads."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def find_head(model: PreTrainedModel, body: nn.Module) -> tuple[Head | OwnLogits, str | None]:
    """Return the head that reproduces the model's own logits, and a note if it is not the fused one.

    Raises UserError for a model that cannot be run, or whose logits neither head reproduces.
    """
    kind = model.config.model_type
    try:
        logits = _own_logits(model, _four_tokens(model))
    except Exception as error:
        raise UserError(f"{kind} models cannot be run as they are loaded here: {one_line(error, named=True)}") from None
    if logits.float().log_softmax(-1).isnan().any():
        wrong = next((name for name, p in model.named_parameters() if not is_finite(p)), None)
        where = "" if wrong is None else f": {wrong} holds numbers that are not finite in its files"
        raise UserError(f"the logits of this model are no numbers (NaN){where}")
    try:
        head: Head | OwnLogits = Head(model)
        check_logits(model, body, head)
        return head, None
    except UserError as error:
        why = str(error)
    except Exception as error:  # the head's input may be something else than the body's hidden states
        why = f"{kind} models make their logits in a way this version does not know ({one_line(error, named=True)})"
    try:
        head = OwnLogits(model, body)
        check_logits(model, body, head)
    except Exception as error:  # the model's forward may read more of its body's output than `_Returned` has
        raise UserError(f"{why}; nor can its own code be asked for them: {one_line(error, named=True)}") from None
    return head, f"logits: by the model's own code, some rows at a time, because {why}"


def check_logits(model: PreTrainedModel, body: nn.Module, head: Head | OwnLogits) -> None:
    """Compare `head` with the model's own logits on four tokens, in float32 if memory suffices.

    Raises UserError if they differ by more than rounding.
    """
    with in_float32(model):
        error, margin = _error(model, body, head)
    if not error <= margin:
        raise UserError(
            f"{model.config.model_type} models change their logits in a way this version does not know "
            f"(log-probabilities differ by {error:.3g})"
        )


@torch.no_grad()
def _error(model: PreTrainedModel, body: nn.Module, head: Head | OwnLogits) -> tuple[float, float]:
    """Return the largest difference of some log-probabilities, and what rounding may make of it."""
    ids = _four_tokens(model)
    logits = _own_logits(model, ids)[0]
    theirs = logits.float().log_softmax(-1)
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    # The likeliest token of each position, and some from the whole vocabulary.
    spread = torch.linspace(0, head.vocabulary - 1, 31, device=ids.device).long().expand(4, -1)
    targets = torch.cat([theirs.argmax(-1, keepdim=True), spread], dim=1)  # [4, 32]
    positions = torch.arange(4, device=ids.device).repeat_interleave(32)
    ours = head(hidden[0], positions, targets.flatten()).logp.float().view(4, 32)
    error = (ours - theirs.gather(1, targets)).abs().max().item()
    # Their logits are rounded to their dtype, once or for each of its steps. The larger they are, the coarser it is.
    spacing = max(torch.finfo(dtype).eps for dtype in (logits.dtype, hidden.dtype))
    return error, 1e-3 + _ROUNDINGS * spacing * logits.abs().max().item()


def _four_tokens(model: PreTrainedModel) -> Tensor:
    """Return four token ids, [1, 4] int64."""
    return torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size


@torch.no_grad()
def _own_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits of the model's own forward, [1, T, V], for tokens [1, T]."""
    return model(input_ids=ids, use_cache=False).logits
