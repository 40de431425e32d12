"""What vLLM takes of an adapter, by its own rules: settings, ranks, and names of tensors.

Read in vllm/lora/peft_helper.py, utils.py (`parse_fine_tuned_lora_name`) and lora_model.py, and in vllm/config/lora.py
for the ranks. PEFT itself takes everything that a run writes.
"""

import re
from collections.abc import Iterable

import peft

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank may be; 16 is its default
_LAYER = re.compile(r"^base_model\.model\.(?P<module>.+)\.(lora_[AB]\.weight|lora_embedding_[AB])$")


def vllm_obstacles(settings: peft.LoraConfig, names: Iterable[str]) -> list[str]:
    """Return why vLLM will not serve an adapter with these settings and names of tensors, or not as it was trained."""
    found = []
    if settings.use_dora:
        found.append("DoRA is not computed there")
    if settings.modules_to_save:
        found.append(f"modules that are trained in full ({', '.join(settings.modules_to_save)}) are refused")
    if settings.bias != "none" or settings.lora_bias:
        found.append("biases of adapters are refused")
    if any(_scaling(settings, key) != _scaling(settings) for key in _patterns(settings)):
        found.append("one scaling is taken for all layers, and rank_pattern or alpha_pattern gives some another")
    if _largest_rank(settings) > RANKS[-1]:
        found.append(f"rank {_largest_rank(settings)} is above {RANKS[-1]}, the largest")
    if settings.use_rslora and settings.target_parameters:
        found.append("experts are scaled by alpha/rank, although rsLoRA says otherwise")
    if settings.trainable_token_indices:
        found.append("trained rows of new tokens are not taken")
    saved = tuple(settings.modules_to_save or ())
    others = [name for name in names if not _LAYER.match(name) and not _of(name, saved) and not _known(name)]
    if others:
        found.append(f"it knows no tensors named {', '.join(sorted(others)[:3])}")
    return found


def _known(name: str) -> bool:
    """Return whether another obstacle names what a tensor belongs to."""
    return "magnitude" in name or "token_adapter" in name


def vllm_rank(settings: peft.LoraConfig) -> int:
    """Return the least --max-lora-rank with which vLLM takes an adapter of this rank."""
    largest = _largest_rank(settings)
    return next((rank for rank in RANKS if rank >= largest), largest)


def serving_note(settings: peft.LoraConfig, names: Iterable[str]) -> str | None:
    """Return a note on what vLLM needs to serve an adapter, or why it will not; None if its defaults do."""
    if why := vllm_obstacles(settings, names):
        return f"vLLM does not serve this adapter as it is: {'; '.join(why)}. It serves what fastpref merge writes"
    if (rank := vllm_rank(settings)) > 16:
        return f"vLLM serves this adapter with --max-lora-rank {rank}"
    return None


def _patterns(settings: peft.LoraConfig) -> set[str]:
    return {*(settings.rank_pattern or {}), *(settings.alpha_pattern or {})}


def _scaling(settings: peft.LoraConfig, pattern: str = "") -> float:
    """Return the scaling of the layers of a pattern, by default that of all others."""
    rank = (settings.rank_pattern or {}).get(pattern, settings.r)
    alpha = (settings.alpha_pattern or {}).get(pattern, settings.lora_alpha)
    return alpha / (rank**0.5 if settings.use_rslora else rank)


def _largest_rank(settings: peft.LoraConfig) -> int:
    return max(settings.r, *(settings.rank_pattern or {"": 0}).values())


def _of(name: str, modules: Iterable[str]) -> bool:
    return any(f".{module}." in f".{name}" for module in modules)
