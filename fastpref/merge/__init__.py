"""`fastpref merge`: add an adapter to the weights it was trained with, one tensor at a time.

checkpoint.py reads the model's files, names.py maps their tensors to those of the model, adapter.py adds the adapter by
PEFT's own arithmetic, plan.py decides what happens to each tensor, folder.py writes, and verify.py compares.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastpref.atomic import write_folder
from fastpref.errors import UserError
from fastpref.merge.adapter import adapted, with_adapter
from fastpref.merge.checkpoint import Checkpoint, model_folder
from fastpref.merge.folder import Writer
from fastpref.merge.plan import bare_model, make_plan, merge_fault, nf4_weights
from fastpref.merge.verify import lost_share
from fastpref.run.trained import Trained

__all__ = ["Merged", "merge", "merge_fault"]


@dataclass(frozen=True)
class Merged:
    """The result of a merge."""

    folder: Path
    tensors: int  # number of model tensors that the adapter changed
    untied: bool  # whether the head got a weight of its own
    onto: str  # which weights the adapter was added to, in words
    lost: float | None = None  # share of the adapter's change of a probe's logits; None if not verified


def merge(
    trained: Trained,
    output: Path,
    *,
    dequantized: bool | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Merged:
    """Write the base model merged with its adapter to a folder, as transformers loads it.

    `dequantized`: add the adapter to the 4-bit weights it was trained with, dequantised, instead of those in the
    model's files; by default if the run's config says nf4. `dtype`: the dtype to write; None is that of the model's
    files. `verify`: load both models, one after the other, and compare the logits of a probe. Raises UserError for
    weights that cannot be merged; the folder exists only if everything has succeeded.
    """
    options = trained.config.model
    if not trained.is_adapter:
        bare_model(trained.config.but({"model.name": trained.weights}).model)  # raises if there is no model at all
        raise UserError(
            f"{trained.weights}: not an adapter: there is nothing to merge. It is the whole trained model already, "
            "which transformers loads as it is"
        )
    if output.exists():
        raise UserError(f"--output {output}: is there already")
    model = bare_model(options)
    checkpoint = Checkpoint(model_folder(options))
    nf4_run = options.quantization == "nf4" and not checkpoint.dequantised
    if dequantized and not nf4_run:
        raise UserError('--dequantized: the run\'s config does not say model.quantization = "nf4"')
    nf4 = nf4_run if dequantized is None else dequantized
    with_adapter(model, trained)
    plan = make_plan(options, checkpoint, adapted(model), nf4_weights(trained.config) if nf4 else frozenset())
    writer, lost = Writer(plan, dtype), None

    def fill(folder: Path) -> None:
        nonlocal lost
        writer.fill(folder, trained)
        if verify:
            lost = lost_share(folder, trained, nf4=nf4, plain=checkpoint.dequantised, whole=writer.whole)

    write_folder(output, fill)
    return Merged(output, len(writer.changed), plan.untied, _onto(trained, checkpoint, nf4), lost)


def _onto(trained: Trained, checkpoint: Checkpoint, nf4: bool) -> str:
    options = trained.config.model
    if nf4:
        return "the nf4 weights that it was trained with, dequantised"
    if checkpoint.dequantised:
        return f"the weights of {options.name}, dequantised"
    form = f", not their {options.quantization} form that it was trained with" if options.quantization != "none" else ""
    return f"the weights of {options.name}{form}"
