"""The choice of how much of a model is streamed from host memory."""

import torch

from fastpref.config import Config
from fastpref.model.streaming.stream import Streaming


def choose_streaming(
    config: Config, device: torch.device, *, sharded: bool = False
) -> tuple[Streaming | None, list[str]]:
    """Return how much `model.streaming` streams, or None for a model that lies on the device. Also returns notes."""
    return (Streaming() if config.model.streaming is True else None), []
