"""The language-model head: its weight, and what the model does to its logits."""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.errors import UserError
from fastpref.kernels.head_weight import FourBitWeight, HeadWeight
from fastpref.ops import LoraWeight, TokenLogprobs, linear_logprob


@dataclass(frozen=True)
class LogitSettings:
    """logits = softcap(scale · (hidden·Wᵀ + b))"""

    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LogitSettings":
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(getattr(config, "final_logit_softcapping", None), float(scale))


class Head(nn.Module):
    """A model's output layer as a weight and a bias, whatever PEFT has wrapped around it."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        module = model.get_output_embeddings()
        if module is None:
            raise UserError(
                f"{model.config.model_type} models have no language-model head; a causal language model is needed"
            )
        self.module = module
        self.settings = LogitSettings.of(model)

    def forward(
        self,
        hidden: Tensor,  # [M, H]
        positions: Tensor,  # [N] the row of `hidden` that predicts each target
        targets: Tensor,  # [N]
        outputs: tuple[str, ...] = (),
    ) -> TokenLogprobs:
        """Log-probabilities of the targets, with `linear_logprob`'s outputs."""
        weight, bias = self.weight_and_bias(hidden.dtype)
        settings = self.settings
        return linear_logprob(
            hidden, weight, targets, bias,
            positions=positions, softcap=settings.softcap, logit_scale=settings.scale, outputs=outputs,
        )  # fmt: skip

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits of some rows, float32 [N, V], of hidden [N, H]: where a whole distribution is asked for."""
        logits = self.module(hidden).float() * self.settings.scale
        cap = self.settings.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def weight_and_bias(
        self, dtype: torch.dtype | None = None
    ) -> tuple[Tensor | HeadWeight | LoraWeight, Tensor | None]:
        """weight [V, H] and bias [V] or None, of the adapter that is active now; a 4-bit weight comes as `dtype`."""
        module = self.module
        if isinstance(module, ModulesToSaveWrapper):
            active = module.active_adapters
            saved = not module.disable_adapters and active and active[0] in module.modules_to_save
            module = module.modules_to_save[active[0]] if saved else module.original_module
        if not isinstance(module, BaseTunerLayer):
            return _plain(module, dtype), getattr(module, "bias", None)
        base = module.get_base_layer()
        weight, bias = _plain(base, dtype), getattr(base, "bias", None)
        if module.disable_adapters or module.merged:
            return weight, bias
        return _with_lora(module, weight), bias

    @property
    def vocabulary(self) -> int:
        base: Any = self.module.get_base_layer() if isinstance(self.module, BaseTunerLayer) else self.module
        base = base.original_module if isinstance(base, ModulesToSaveWrapper) else base
        return base.num_embeddings if isinstance(base, nn.Embedding) else base.out_features


def _plain(module: Any, dtype: torch.dtype | None) -> Tensor | HeadWeight:
    if getattr(module.weight, "quant_state", None) is not None:  # bitsandbytes' Params4bit
        return FourBitWeight.of(module.weight, dtype)
    if isinstance(module, nn.Linear | nn.Embedding) and module.weight.is_floating_point():
        return module.weight
    raise UserError(
        f"the head is a {type(module).__name__}, which is not known here; a linear layer is, plain, in 4 bits, trained "
        "or with a LoRA adapter"
    )


def _with_lora(module: Any, weight: Tensor | HeadWeight) -> Tensor | HeadWeight | LoraWeight:
    """PEFT's adapter on the head. Its variants, and several at once, are refused."""
    active = [name for name in module.active_adapters if name in getattr(module, "lora_A", {})]
    if not active:
        return weight
    (name, *more) = active
    if more or module.lora_variant or module.lora_B[name].bias is not None:
        kind = f"{len(active)} adapters" if more else "this variant of LoRA (DoRA, or LoRA with a bias)"
        raise UserError(f"the head cannot have {kind}; take plain LoRA on lm_head, or leave it out of lora.target")
    dropout = module.lora_dropout[name]
    return LoraWeight(
        weight,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        module.scaling[name],
        None if isinstance(dropout, nn.Identity) else dropout,
    )


@torch.no_grad()
def check_logits(model: PreTrainedModel, backbone: nn.Module, head: Head) -> None:
    """Refuse a model whose logits are not what `head` says: four tokens through both ways."""
    device = next(backbone.parameters()).device
    vocabulary = head.vocabulary
    ids = torch.arange(4, device=device)[None] % vocabulary
    theirs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    # The likeliest token of each place, and some from all over the vocabulary.
    spread = torch.linspace(0, vocabulary - 1, 31, device=device).long().expand(4, -1)
    targets = torch.cat([theirs[0].argmax(-1, keepdim=True), spread], dim=1)  # [4, 32]
    positions = torch.arange(4, device=device).repeat_interleave(32)
    ours = head(hidden[0], positions, targets.flatten()).logp.float().view(4, 32)
    error = (ours - theirs[0].gather(1, targets)).abs().max().item()
    margin = 1e-3 if hidden.dtype == torch.float32 else 0.25
    if not error <= margin:
        raise UserError(
            f"{model.config.model_type} models change their logits in a way this version does not know "
            f"(log-probabilities differ by {error:.3g}); please report the model"
        )
