"""Hashes of what a run begins with, which a checkpoint keeps and several processes compare."""

import hashlib
from array import array
from collections.abc import Iterable

from peft import PeftModel

from fastpref.data.example import Example
from fastpref.model.load import Loaded

# As messages and checkpoints name them.
MODEL, DATA = "the model's weights", "the training rows or their tokens"
ADAPTERS = "the adapters that it began with"


def model_fingerprint(loaded: Loaded) -> str:
    """Hash a sample of every weight that a run begins with: of the frozen ones with adapters, or else of all."""
    digest, adapters = hashlib.sha256(), isinstance(loaded.wrapped, PeftModel)
    for name, parameter in loaded.model.named_parameters():
        if not (adapters and parameter.requires_grad):
            values = parameter.detach().flatten()
            sample = values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes()
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample)
    return digest.hexdigest()


def data_fingerprint(examples: Iterable[Example]) -> str:
    """Hash the tokens, labels, unscored spans, scores, weights and margins of the training examples in their order."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt, *example.completions):
            digest.update(array("i", [len(ids), *ids]).tobytes())
        digest.update(f"{example.label}{example.contexts or ''}".encode())
        extras = example.scores, example.weight, example.margin
        digest.update(b"" if extras == ((), 1.0, None) else f"{extras}".encode())
    return digest.hexdigest()
