"""The frozen reference: the same model with its adapters off, a copy of it, or (`precompute.py`) its numbers."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.data.batch import PreferenceBatch
from fastpref.model.load import Loaded
from fastpref.model.policy import Policy

Reference = Callable[[PreferenceBatch], Tensor]  # token log-probabilities [N], without gradient


def make_reference(config: Config, loaded: Loaded, autocast: Callable[..., Any] = nullcontext) -> tuple[Reference, str]:
    """The reference of `reference.mode`, and which one it is, in words. Call it before any training step.

    For "precompute" (and "auto" without adapters) it is the model itself, right only until the first step.
    `autocast` makes the mixed precision of the policy: a reference in another would differ from it before training.
    """
    adapters = loaded.wrapped if isinstance(loaded.wrapped, peft.PeftModel) else None
    if adapters is not None and config.reference.mode != "copy":
        what = "computed before training" if precomputes(config) else "the same weights with the adapters off"
        return _reference(loaded.policy, adapters, autocast), what
    if precomputes(config):
        return _reference(loaded.policy, None, autocast), "computed before training"
    frozen = copy.deepcopy(loaded.model).requires_grad_(False).eval()
    return _reference(Policy.of(frozen), None, autocast), "a frozen copy of the model"


def precomputes(config: Config) -> bool:
    """Whether the reference's numbers are computed before training: a copy would take the model's memory again."""
    return config.reference.mode == "precompute" or (config.reference.mode == "auto" and config.lora is None)


def _reference(policy: Policy, adapters: peft.PeftModel | None, autocast: Callable[..., Any]) -> Reference:
    @torch.no_grad()
    def logps(batch: PreferenceBatch) -> Tensor:
        training = policy.training
        policy.eval()  # a reference knows no dropout
        try:
            with autocast(), adapters.disable_adapter() if adapters is not None else nullcontext():
                return policy(batch).logp
        finally:
            policy.train(training)

    return logps
