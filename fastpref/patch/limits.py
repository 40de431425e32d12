"""Settings of a trainer that leave its computation to TRL."""

from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from fastpref.patch import Patch


def left_to_liger(patch: "Patch", trainer: Any, self: Any) -> bool:
    """Liger's losses call the body themselves."""
    options = (self, self.args)
    left = any(getattr(o, name, False) for o in options for name in ("use_liger_kernel", "use_liger_loss"))
    if left:
        patch.say(trainer.__name__, "use_liger_kernel computes the loss; TRL's own path is taken")
    return left


def on_one_device(patch: "Patch", trainer: Any, model: Any) -> bool:
    """DDP looks for the tensors of a forward's output, which are not yet there in a `Logits`."""
    if isinstance(model, DistributedDataParallel):
        patch.say(trainer.__name__, "several devices; TRL's own path is taken")
        return False
    return True
