"""Weights that full fine-tuning leaves as they are: `train.freeze`."""

from transformers import PreTrainedModel

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.model.adapters.parts import Parts, matches, short_names, unknown


def freeze(config: Config, model: PreTrainedModel) -> list[str]:
    """Freeze what the entries of `train.freeze` match: modules with all that is in them, or parameters.

    Returns a note on what is frozen. Raises UserError for an entry that matches nothing, and if nothing is left to
    train.
    """
    entries = config.train.freeze
    if not entries:
        return []
    parts = Parts.of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied one by both of its names
    frozen: set[str] = set()
    for entry in entries:
        hits = {name for name in (*parts.modules, *parameters) if matches(entry, name)}
        inside = {name for name in parameters if any(name == hit or name.startswith(f"{hit}.") for hit in hits)}
        if not hits:
            raise UserError(f"train.freeze: {unknown(entry, parts)}")
        if not inside:
            raise UserError(f"train.freeze: {entry} names {short_names(hits)}, which has no weights")
        if inside <= frozen:
            raise UserError(f"train.freeze: {entry} changes nothing: entries before it freeze all that it names")
        frozen |= inside
    for name in frozen:
        parameters[name].requires_grad_(False)
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    if config.tokens.add and any(id(parameters[name]) in ends for name in frozen):
        raise UserError("train.freeze: it names embeddings or head, whose rows tokens.add is to train; leave them out")
    own = parts.parameters()
    if not any(parameter.requires_grad for parameter in own.values()):
        raise UserError("train.freeze: nothing is left to train; name fewer modules")
    tied = {name for name, parameter in parameters.items() if not parameter.requires_grad} - frozen
    also = f"; so are {short_names(tied)}, which are the same weights" if tied else ""
    every = sum(parameter.numel() for parameter in model.parameters())
    count = every - sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return [f"train.freeze: {count:,} of {every:,} parameters are frozen{also}"]
