"""Settings of a trainer with which TRL's own code computes the loss."""

from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from fastpref.patch import Patch


def left_to_liger(patch: "Patch", trainer: Any, self: Any) -> bool:
    """Return whether a trainer uses liger's losses, which call the model's body themselves."""
    options = (self, self.args)
    left = any(getattr(o, name, False) for o in options for name in ("use_liger_kernel", "use_liger_loss"))
    if left:
        patch.say(trainer.__name__, "use_liger_kernel computes the loss; TRL's own path is taken")
    return left


def on_one_device(patch: "Patch", trainer: Any, model: Any) -> bool:
    """Return whether a model is not in DDP, which looks for tensors in a forward's output: `Logits` has none yet."""
    if isinstance(model, DistributedDataParallel):
        patch.say(trainer.__name__, "several devices; TRL's own path is taken")
        return False
    return True
