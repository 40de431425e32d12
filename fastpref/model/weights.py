"""Loading of weights that raises an error unless the files hold every tensor of the model and no others.

transformers initialises tensors that no file holds, drops tensors that the model does not have, and reports both in a
log. Here the same loading report decides: if one change of a prefix makes all names fit, the files are read with it.
Every other mismatch is an error.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

from transformers import PreTrainedModel

from fastpref.errors import UserError

# Prefixes of modules that wrap others in training, which training scripts forget to remove when they save.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
# Tensors that quantised layers have in addition to a weight, or in place of it: bitsandbytes, GPTQ, AWQ, FP8,
# compressed-tensors.
_QUANTISATION = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[\w.]+|SCB|weight_format"
    r"|g_idx|qweight|qzeros|scales|weight_scale(_inv|_2)?|weight_packed|weight_shape|weight_zero_point|input_scale)$"
)
# Constants that older versions of transformers saved and that models now compute: masks, RoPE frequencies, positions.
_CONSTANTS = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.(bias|masked_bias)$|inv_freq$|position_ids$")
# Additional heads, which do not predict the next token.
_OTHER_HEADS = re.compile(r"^v_head\.|(^|\.)mtp(_layers|_block)?\.")

_NOTES = "_fastpref_loading_notes"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Misfit:
    """The differences between the tensors of files and those of a model. True if any of them is an error."""

    missing: tuple[str, ...] = ()  # tensors of the model that no file holds
    unexpected: tuple[str, ...] = ()  # tensors of the files that the model does not have
    misshapen: tuple[tuple[str, Shape, Shape], ...] = ()  # name, shape in the file, shape in the model
    unreadable: tuple[tuple[str, str], ...] = ()  # tensors that transformers failed to convert from the files, and why
    unread: tuple[str, ...] = ()  # additional heads in the files, which are not an error

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen or self.unreadable)

    def __str__(self) -> str:
        parts = {
            "missing in the files": self.missing,
            "in the files without a place in the model": self.unexpected,
            "of another shape": [f"{n} (in the file {list(f)}, in the model {list(m)})" for n, f, m in self.misshapen],
            "not to be made from those of the files": [f"{name} ({why})" for name, why in self.unreadable],
        }
        return "; ".join(f"{_count(names)} {what}: {_some(names)}" for what, names in parts.items() if names)


@dataclass(frozen=True)
class Renaming:
    """A change of prefix that turns the names of a file's tensors into the model's."""

    old: str  # removed from the beginning of a name, or anywhere in it if it is a wrapper's
    new: str  # inserted in its place

    @property
    def anywhere(self) -> bool:
        return self.old in _WRAPPERS

    def __call__(self, name: str) -> str:
        if self.anywhere:
            return name.replace(self.old, "")
        return self.new + name[len(self.old) :] if name.startswith(self.old) else name

    def __str__(self) -> str:
        if not self.new:
            return f"the names of its tensors have `{self.old}` too much and are read without it"
        return f"the names of its tensors begin with `{self.old}` and are read with `{self.new}` instead"

    @property
    def key_mapping(self) -> dict[str, str]:
        """The renaming as the argument `key_mapping` of `from_pretrained`."""
        if self.anywhere:  # each pattern is applied to a name once, and a name may contain a wrapper several times
            return {re.escape(self.old) + "(?:)" * times: "" for times in range(4)}
        return {f"^{re.escape(self.old)}": self.new}


def from_files(load: Callable[..., Any], **options: Any) -> PreTrainedModel:
    """Return the model that `load`, a `from_pretrained` method, loads with these options.

    If one renaming makes all tensors fit, the model is loaded with it, and `loading_notes` says so. Raises UserError,
    which names the first tensors that do not fit, otherwise.
    """
    model, misfit = _loaded(load, **options)
    if model is not None and not misfit:
        if misfit.unread:
            heads = _some(misfit.unread)
            take_note(model, f"model.name: {heads} in its files are not read: no part of the language model")
        return model
    kind, config = ("model", None) if model is None else (type(model).__name__, model.config)
    del model
    renaming = find_renaming(misfit.missing, misfit.unexpected)
    if renaming is not None:
        model, left = _loaded(load, key_mapping=renaming.key_mapping, **options)
        if model is not None and not left:
            take_note(model, f"model.name: {renaming}")
            return model
    raise UserError(f"its files do not hold this {kind}: {misfit}. {_probable_cause(misfit, config)}")


def loading_notes(model: Any) -> list[str]:
    """Return at most one sentence, on tensors that were renamed or not read."""
    return vars(model).get(_NOTES, [])


def take_note(model: Any, note: str) -> None:
    """Store a note for `loading_notes` on a model."""
    setattr(model, _NOTES, [note])


def find_renaming(missing: Iterable[str], unexpected: Iterable[str]) -> Renaming | None:
    """Return the renaming that turns the most unexpected names into missing ones, or None.

    Only names are compared, and some may remain. A caller that cannot load again must check that all names fit.
    """
    wanted, others = set(missing), sorted(unexpected)
    if not wanted or not others:
        return None
    some = [*others[:8], *others[-8:]]  # a few names are enough to find a prefix that all have
    pairs = {_prefixes(name, max(sorted(wanted), key=lambda own: _shared(name, own))) for name in some}
    renamings = [Renaming(*pair) for pair in sorted(pair for pair in pairs if pair is not None and pair[0])]
    renamings += [Renaming(wrapper, "") for wrapper in _WRAPPERS]
    renamings = [r for r in renamings if all(r(name) != name for name in others)]
    hits = {renaming: sum(renaming(name) in wanted for name in others) for renaming in renamings}
    best = max(hits, key=lambda renaming: hits[renaming], default=None)
    return best if best is not None and hits[best] else None


def _prefixes(name: str, own: str) -> tuple[str, str] | None:
    """Return the prefixes of two names before the end that they share, or None if neither prefix extends the other."""
    shared = _shared(name, own)
    old, new = (n.split(".")[:-shared] if shared else [] for n in (name, own))
    shorter, longer = sorted((old, new), key=len)
    more = list(longer)
    for part in shorter:
        if part not in more:
            return None  # another word is another module
        more.remove(part)
    if not shared or any(part.isdecimal() for part in more):  # another number is another layer
        return None
    return "".join(f"{part}." for part in old), "".join(f"{part}." for part in new)


def _shared(name: str, own: str) -> int:
    """Return how many parts, from the end, two dotted names share."""
    pairs = zip(reversed(name.split(".")), reversed(own.split(".")))
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(name.count("."), own.count(".")) + 1)


# --- one loading -----------------------------------------------------------------------------------------------------


def _loaded(load: Callable[..., Any], **options: Any) -> tuple[PreTrainedModel | None, Misfit]:
    """Return a model and its misfit; the model is None if transformers failed to convert its tensors."""
    try:
        # With ignore_mismatched_sizes the report lists wrong shapes too. Without, an error refers to a log.
        model, info = load(output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except RuntimeError as error:
        report = _report_of(error)
        if report is None:
            raise
        unreadable = {name: _last_line(text) for name, text in getattr(report, "conversion_errors", {}).items()}
        return None, Misfit(unreadable=tuple(sorted(unreadable.items())))
    quantised = getattr(model, "is_quantized", False)
    unexpected = [
        name for name in sorted(info["unexpected_keys"])
        if not _CONSTANTS.search(name) and not (quantised and _QUANTISATION.search(name))
    ]  # fmt: skip
    heads = tuple(name for name in unexpected if _OTHER_HEADS.search(name))
    misshapen = sorted((name, tuple(file), tuple(own)) for name, file, own in info["mismatched_keys"])
    missing = tuple(sorted(info["missing_keys"]))
    return model, Misfit(missing, tuple(n for n in unexpected if n not in heads), tuple(misshapen), unread=heads)


def _report_of(error: BaseException) -> Any:
    """Return transformers' report of a failed load from the traceback: the error that it raises lacks it."""
    reports = (frame.f_locals.get("loading_info") for frame, _ in walk_tb(error.__traceback__))
    return next((report for report in reports if getattr(report, "conversion_errors", None)), None)


def _last_line(text: str) -> str:
    """Return the message of the error at the end of a traceback."""
    named = re.findall(r"^(?:\w+\.)*\w+(?:Error|Exception): (.+)$", text, re.MULTILINE)
    return (named or text.strip().splitlines() or ["no reason is given"])[-1].strip()[:200]


# --- what probably happened ------------------------------------------------------------------------------------------


def _probable_cause(misfit: Misfit, config: Any) -> str:
    """Return a sentence on the probable cause and its remedy."""
    text = None if config is None else config.get_text_config()
    if any(".lora_" in name or ".base_layer." in name for name in misfit.unexpected):
        advice = "save the model after merge_and_unload, or the adapter by itself and merge that"
        return f"An adapter is saved in them unmerged, as the state of a PEFT model: {advice}"
    if any(_QUANTISATION.search(name) for name in misfit.unexpected):
        return "They hold quantised weights, and config.json has no quantization_config that says so"
    if misfit.unreadable:
        return "Parts of them are probably missing or of another size: download or save the model again"
    vocabulary = getattr(text, "vocab_size", None)
    shapes = [(file, own) for _, file, own in misfit.misshapen]
    if shapes and all(own[:1] == (vocabulary,) and file[1:] == own[1:] for file, own in shapes):
        resized = f"The vocabulary was probably resized to {shapes[0][0][0]:,}"
        return f"{resized} and config.json not saved with it: its vocab_size is {vocabulary:,}"
    if shapes:
        return "config.json is probably that of a model of another size, or parts of the files are missing"
    layers = getattr(text, "num_hidden_layers", None)
    numbers = [re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}") for name in misfit.unexpected]
    beyond = [int(n[1]) for n in numbers if n is not None and layers is not None and int(n[1]) >= layers]
    if beyond and not misfit.missing and len(beyond) == len(misfit.unexpected):
        return f"config.json counts {layers} layers and the files go on to layer {max(beyond)} (counted from 0)"
    if misfit.missing and all("head" in name or "embed_out" in name for name in misfit.missing):
        return (
            "The model was probably saved without its language-model head (by AutoModel, as a classifier or as a "
            "reward model), or it shares the head with the embeddings and config.json lacks tie_word_embeddings = true"
        )
    if misfit.missing and not misfit.unexpected:
        return "Files are probably missing or incomplete: download or save the model again"
    if misfit.missing:
        return "config.json is probably that of another model, or the names were changed when the model was saved"
    return "config.json probably describes another model: these tensors would be lost"


def _count(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
