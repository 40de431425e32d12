"""The labels of a call to the model, found in the batch for which TRL makes the call."""

from typing import Any

import torch
from torch import Tensor

from fastpref.patch.trees import IGNORED

_LABELS = (  # keys of a batch: tokens, and the mask or labels of their completions
    ("input_ids", "completion_mask"),
    ("completion_input_ids", "completion_mask"),
    ("completion_input_ids", "completion_labels"),
    ("KL_input_ids", "KL_completion_mask"),
    ("KL_completion_input_ids", "KL_completion_mask"),
    ("KL_completion_input_ids", "KL_completion_labels"),
)


def completion_labels(inputs: Any, input_ids: Tensor, _mask: Tensor) -> Tensor | None:
    """Return the labels of the batch's completions, or of its mismatched ones, for a call with these tokens."""
    for name, marks_name in _LABELS:
        ids, marks = inputs.get(name), inputs.get(marks_name)
        if ids is None or marks is None or not (ids is input_ids or torch.equal(ids, input_ids)):
            continue
        return marks if marks_name.endswith("labels") else input_ids.masked_fill(marks == 0, IGNORED)
    return None


def mismatched_ids(batch: Any) -> Tensor | None:
    return batch.get("KL_input_ids", batch.get("KL_completion_input_ids"))


def concatenated_labels(batch: Any, input_ids: Tensor, _mask: Tensor) -> Tensor | None:
    """Return the labels of the chosen rows and then of the rejected ones, padded to the width of the call's rows."""
    sides = [batch.get(f"{side}_labels") for side in ("chosen", "rejected")]
    width = input_ids.shape[1]
    if any(side is None or side.shape[1] > width for side in sides):
        return None
    wide = [torch.nn.functional.pad(side, (0, width - side.shape[1]), value=IGNORED) for side in sides]
    labels = torch.cat(wide).to(input_ids.device)
    return labels if labels.shape == input_ids.shape else None


def counted_labels(batch: Any, keep_end: bool, input_ids: Tensor, mask: Tensor) -> Tensor | None:
    """Return the labels of rows that TRL has joined from prompts and completions, truncated, and moved to the left."""
    sides = [batch[f"{side}_attention_mask"].sum(1) for side in ("chosen", "rejected")]
    completions = torch.cat(sides).to(mask.device)  # lengths before truncation
    prompts = batch["prompt_attention_mask"].sum(1).to(mask.device).repeat(2)
    if mask.shape != input_ids.shape or len(prompts) != len(mask):
        return None
    start = (mask.sum(1) - completions).clamp(min=0) if keep_end else prompts
    scored = mask.bool() & (mask.cumsum(1) > start[:, None])
    return input_ids.masked_fill(~scored, IGNORED)
