"""The language-model head: its weight, and what the model does to its logits."""

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.errors import UserError
from fastpref.ops import TokenLogprobs, linear_logprob


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

    def forward(self, rows: Tensor, targets: Tensor, outputs: tuple[str, ...] = ()) -> TokenLogprobs:
        """Log-probabilities of targets [N] after hidden states `rows` [N, H], with `linear_logprob`'s outputs."""
        weight, bias = self.weight_and_bias()
        settings = self.settings
        return linear_logprob(
            rows, weight, targets, bias, softcap=settings.softcap, logit_scale=settings.scale, outputs=outputs
        )

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """weight [V, H] and bias [V] or None, of the adapter that is active now."""
        module = self.module
        if isinstance(module, ModulesToSaveWrapper):
            active = module.active_adapters
            saved = not module.disable_adapters and active and active[0] in module.modules_to_save
            module = module.modules_to_save[active[0]] if saved else module.original_module
        if isinstance(module, BaseTunerLayer) or not isinstance(module, nn.Linear | nn.Embedding):
            raise UserError(
                f"the head is a {type(module).__name__}, which is not in this version yet; a plain linear layer is, "
                "trained (lora.modules_to_save) or not"
            )
        return module.weight, getattr(module, "bias", None)


@torch.no_grad()
def check_logits(model: PreTrainedModel, backbone: nn.Module, head: Head) -> None:
    """Refuse a model whose logits are not what `head` says: four tokens through both ways."""
    device = next(backbone.parameters()).device
    vocabulary = head.weight_and_bias()[0].shape[0]
    ids = torch.arange(4, device=device)[None] % vocabulary
    theirs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    # The likeliest token of each place, and some from all over the vocabulary.
    spread = torch.linspace(0, vocabulary - 1, 31, device=device).long().expand(4, -1)
    targets = torch.cat([theirs[0].argmax(-1, keepdim=True), spread], dim=1)  # [4, 32]
    ours = head(hidden[0].repeat_interleave(32, dim=0), targets.flatten()).logp.float().view(4, 32)
    error = (ours - theirs[0].gather(1, targets)).abs().max().item()
    margin = 1e-3 if hidden.dtype == torch.float32 else 0.25
    if not error <= margin:
        raise UserError(
            f"{model.config.model_type} models change their logits in a way this version does not know "
            f"(log-probabilities differ by {error:.3g}); please report the model"
        )
