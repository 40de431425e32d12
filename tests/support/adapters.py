"""Trained LoRA adapters, as PEFT saves them."""

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

DEFAULTS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def save_adapter(folder: Path, base: Path, *, seed: int = 0, size: float = 0.05, **settings: Any) -> Path:
    """Write an adapter of a model with random weights to a folder, and return the folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = peft.LoraConfig(**{**DEFAULTS, "task_type": "CAUSAL_LM", **settings})
    wrapped = peft.get_peft_model(model, options)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder
