"""The plan for computing a model: as a forest, with only its head replaced, or by TRL's own code."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from fastpref.errors import UserError
from fastpref.model import rope
from fastpref.model.adapters.fused import fuse_lora, unfuse_lora
from fastpref.model.attention import AttentionState, attention_of, restore_attention
from fastpref.model.attention_choice import FLEX, why_not
from fastpref.model.body import body_of
from fastpref.model.failure import is_out_of_memory, words
from fastpref.model.head import Head, check_logits
from fastpref.model.policy import Policy
from fastpref.model.trial import give_layout

NOT_WANTED = "prefix_sharing=False"


@dataclass(frozen=True)
class Plan:
    """The way in which a model's forward passes are computed. It holds the model's parts but not the model."""

    backbone: nn.Module | None = None
    head: Head | None = None
    refused: str | None = None  # the reason why TRL's own code computes the model
    padded: str | None = None  # the reason why rows stay padded
    rotary: bool = False  # whether positions only matter relative to each other
    by_length: bool = False  # whether rotary angles depend on the longest position of a call
    was: AttentionState | None = field(default=None, repr=False)  # the attention that the model had before

    @property
    def was_eager(self) -> bool:
        """Whether the attention before was transformers' eager attention."""
        return self.was is not None and any(name == "eager" for _, name in self.was)

    def restore(self, model: PreTrainedModel) -> None:
        """Restore the model's own attention and LoRA layers."""
        unfuse_lora(model)
        if self.was is not None:
            restore_attention(self.was)


def bare(model: Any) -> Any:
    """Return the causal language model inside the wrappers of DDP and PEFT."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model.get_base_model() if isinstance(model, PeftModel) else model


def make_plan(trainer: Any, wrapped: Any, *, sharing: bool) -> Plan:
    """Make the plan for a trainer's model, and replace its attention if sharing is wanted and possible."""
    model = bare(wrapped)
    why = _refusal(trainer, wrapped, model)
    if why is not None:
        return Plan(refused=why)
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"]
    modes = {module: module.training for module in model.modules()}
    try:
        # A trial run draws random numbers for its dropout.
        with torch.random.fork_rng(devices=set(devices)), rope.unchanged(model):
            by_length = rope.depends_on_length(model)
            rope.fix_rope(model, 0)  # the trial compares rows of different lengths, which need the same angles
            backbone, head = body_of(model), Head(model)
            head.weight_and_bias()
            model.eval()
            check_logits(model, backbone, head)
            why, was = _give_trees(trainer, model, Policy(backbone, head)) if sharing else (NOT_WANTED, None)
    except UserError as error:
        return Plan(refused=str(error))
    except Exception as error:  # the model may need more inputs than tokens, which TRL may provide
        if is_out_of_memory(error):
            raise
        return Plan(refused=f"{model.config.model_type} models cannot be tried: {words(error)}")
    finally:
        for module, mode in modes.items():
            module.training = mode
    fuse_lora(model)
    config = model.config.get_text_config()
    rotary = any(getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling"))
    return Plan(backbone, head, padded=why, rotary=rotary, by_length=by_length, was=was)


def _refusal(trainer: Any, wrapped: Any, model: Any) -> str | None:
    """Return the reason why TRL must compute a model, if that is known without a trial run, or None."""
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is no transformers model that is known here"
    config: Any = model.config
    if config.is_encoder_decoder:
        return f"{config.model_type} is an encoder-decoder"
    if config.get_text_config() is not config or getattr(trainer, "_is_vision_dataset", False):
        return f"{config.model_type} models take images or sound as well as text"
    inner = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    if isinstance(inner, PeftModel) and getattr(inner.active_peft_config, "is_prompt_learning", False):
        return f"{inner.active_peft_config.peft_type} is prompt learning: its rows hold tokens of their own"
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP and DeepSpeed hold parts of a model on other devices"
    if getattr(trainer.args, "torch_compile", False):
        return "the model is compiled by torch.compile"
    return None


def _give_trees(trainer: Any, model: PreTrainedModel, policy: Policy) -> tuple[str | None, AttentionState | None]:
    """Replace a model's attention. Return why that is impossible, or None, and the attention that the model had."""
    was, own = attention_of(model), model.config._attn_implementation
    calls, why = give_layout(model, policy)
    if why is None and own == "sdpa" and any(call.softcap is not None for call in calls):
        why = "it was loaded with SDPA, which leaves out the softcap of its attention"
        restore_attention(was)
    if why is not None:
        return why, None
    # TRL's users load a model in float32 and train it in half precision: attention computes in that.
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    device = next(model.parameters()).device
    if why_not(FLEX, calls, half or model.dtype, device) is None:
        model.set_attn_implementation(FLEX.name)
    return None, was
