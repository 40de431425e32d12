"""Names of devices."""

import torch


def with_index(device: torch.device | str) -> torch.device:
    """Return a device as its tensors name it: "cuda" means the current GPU, and a tensor on it is on "cuda:0".

    A device without an index equals none that has one, so it must not be compared with a tensor's.
    """
    device = torch.device(device)
    if device.type in ("cpu", "meta") or device.index is not None:
        return device
    # Before CUDA is initialised the current GPU is the first one, and asking for it would initialise CUDA.
    current = torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_initialized() else 0
    return torch.device(device.type, current)
