"""Write a whole trained model as a GGUF file, with a Modelfile, a model card and the licence beside it."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import GenerationConfig

from fastpref.config import ModelConfig
from fastpref.errors import UserError
from fastpref.export.card import CARD, Provenance, card_text, general, provenance
from fastpref.export.chat_text import Turns, turns_of
from fastpref.export.families import Family, family_of
from fastpref.export.gguf_file import file_size, write_gguf
from fastpref.export.modelfile import modelfile
from fastpref.export.place import check_place, check_space, write_together
from fastpref.export.quantise import QUANTS, Written, choose
from fastpref.export.rope import divisors
from fastpref.export.settings import context_length, model_settings, window_note
from fastpref.export.tensors import Piece, TensorNames, check_complete, learned
from fastpref.export.uses import of_model
from fastpref.export.vocabulary import Vocabulary, read_vocabulary
from fastpref.export.weights import Weights, open_weights
from fastpref.model.adapters.trained import rows_for
from fastpref.model.files import hub_options, model_config
from fastpref.run.trained import Trained, trained_tokenizer


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    file: Path
    size: int  # bytes
    types: dict[str, int]  # how many tensors have each type
    notes: tuple[str, ...]
    next: tuple[str, ...]  # commands that use the file

    @property
    def summary(self) -> str:
        """What was written, the notes, and the commands that use the file, in lines."""
        types = ", ".join(f"{count} in {name}" for name, count in self.types.items())
        written = f"{self.file}: {self.size / 1e6:,.1f} MB; tensors: {types}"
        return "\n".join([written, *(f"note: {note}" for note in self.notes), *(f"next: {line}" for line in self.next)])


def export_model(
    trained: Trained, output: Path | None = None, *, quant: str = "q8_0", dequantized: bool | None = None
) -> Exported:
    """Write a trained model, merged with its adapter, to a file `output`, by default that of `default_output`.

    `quant`: one of QUANTS. `dequantized`: as in `fastpref merge`. Raises UserError for models that llama.cpp
    would not compute as transformers does, before anything is written.
    """
    if quant not in QUANTS:
        raise UserError(f"--quant {quant}: take one of {', '.join(QUANTS)}")
    plan = plan_model(trained, quant, dequantized)
    file = output or default_output(trained, quant)
    tokenizer, ends = trained_tokenizer(trained), plan.vocabulary.ends
    turns = turns_of(tokenizer, _keywords(trained), ends) if tokenizer.chat_template else None
    ollama = turns is not None or not tokenizer.chat_template
    beside = _beside(plan, file, turns, of_model(Path(file.name), plan.known.name, ollama=ollama))
    check_place(file, beside)
    size = file_size(plan.tensors)
    check_space(file.parent, size)

    def fill(path: Path) -> None:
        write_gguf(path, plan.family.arch, plan.settings, plan.tensors, plan.values)

    write_together(file, fill, beside)
    types = Counter(written.type.name.lower() for written in plan.tensors.values())
    next_commands = of_model(file, plan.known.name, ollama=ollama)
    return Exported(file, file.stat().st_size, dict(types), plan.notes, next_commands)


def default_output(trained: Trained, quant: str) -> Path:
    """Return the file that is written if none is named: in a folder of its own, named after the run."""
    name = provenance(trained).name
    return Path(f"{name}-gguf") / f"{name}-{quant}.gguf"


@dataclass(frozen=True)
class Plan:
    """Everything that is written, of which only the weights have not been read."""

    family: Family
    config: Any  # transformers' config of the model
    known: Provenance
    vocabulary: Vocabulary
    weights: Weights
    pieces: dict[str, list[Piece]]  # by the names of the model's tensors
    extra: dict[str, Tensor]
    tensors: dict[str, Written]  # in the order of the file
    settings: list[tuple[str, Any]]
    quant: str
    notes: tuple[str, ...]

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the file in float32."""
        yield from self.extra.items()
        for name, tensor in self.weights.read():
            for piece in self.pieces.get(name, ()):
                yield piece.name, piece.of(tensor)


def plan_model(trained: Trained, quant: str, dequantized: bool | None) -> Plan:
    """Plan an export from headers and configs. Raises UserError if it is impossible."""
    options = options_of(trained)
    config = deepcopy(model_config(options).get_text_config())
    if trained.is_adapter:  # which may have rows for new tokens
        config.vocab_size = max(config.vocab_size, rows_for(trained.weights))
    family = family_of(config)
    described = list(model_settings(config, family))
    tokenizer = trained_tokenizer(trained)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, ends_of(trained, options, tokenizer))
    weights = open_weights(trained, dequantized=dequantized)
    if weights.plan.head in weights.names and not family.untied:
        raise UserError(
            f"the model has a head of its own, and llama.cpp takes the embeddings for {config.model_type}'s"
        )
    names = TensorNames(config, family)
    pieces = {name: names.pieces(name) for name in learned(weights.names)}
    extra = dict(divisors(config))
    tensors = {name: choose(name, tensor.shape, quant) for name, tensor in extra.items()}
    for name, parts in pieces.items():
        meta = torch.empty(weights.shapes[name], device="meta")
        tensors |= {part.name: choose(part.name, part.of(meta).shape, quant) for part in parts}
    check_complete(tensors, config)
    known = provenance(trained)
    settings = [
        ("type", gguf.GGUFType.MODEL), *general(known), ("file_type", QUANTS[quant][1]),
        ("quantization_version", gguf.GGML_QUANT_VERSION), *described, *vocabulary.settings,
    ]  # fmt: skip
    notes = [note for note in (window_note(config, family),) if note]
    notes += vocabulary.notes
    if fallen := sum(written.fallback for written in tensors.values()):
        notes.append(
            f"{fallen} of {len(tensors)} tensors are f16: their rows are no multiple of {quant}'s blocks of 32"
        )
    if trained.text is not None and trained.text.chat_template_kwargs:
        notes.append(
            "the training gave the chat template keywords, which the file cannot hold: llama-server takes them as "
            f"--chat-template-kwargs '{_json(trained.text.chat_template_kwargs)}'"
        )
    return Plan(
        family, config, known, vocabulary, weights, pieces, extra, tensors, settings, quant, tuple(notes)
    )  # fmt: skip


def options_of(trained: Trained) -> ModelConfig:
    """Return the options of the model whose config.json describes the trained model."""
    if trained.is_adapter or trained.weights == trained.config.model.name:
        return trained.config.model
    return trained.config.but({"model.name": trained.weights, "model.revision": None}).model


def ends_of(trained: Trained, options: ModelConfig, tokenizer: Any) -> list[int]:
    """Return the tokens at which answers end: the tokenizer's EOS, those of the training, and the model's own."""
    own: list[int] = []
    try:
        generation = GenerationConfig.from_pretrained(options.name, **hub_options(options)).eos_token_id
        own = [generation] if isinstance(generation, int) else list(generation or ())
    except OSError:  # there is none
        pass
    trained_ends = [] if trained.text is None else list(trained.text.ends.values())
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*eos, *trained_ends, *own]))


def _keywords(trained: Trained) -> Mapping[str, Any]:
    return {} if trained.text is None else trained.text.chat_template_kwargs


def _beside(plan: Plan, file: Path, turns: Turns | None, uses: Sequence[str]) -> dict[str, str | bytes]:
    """Return the files that lie beside the GGUF file. `uses` are the commands that run it."""
    licence = next((content.decode(errors="replace") for name, content in plan.known.files.items()
                    if name.upper().startswith("LICEN")), None)  # fmt: skip
    context = context_length(plan.config, plan.family)
    template = None if turns is None else turns.template()
    ollama = modelfile(file.name, template, plan.vocabulary.ends, context, licence)
    commands = "\n".join(uses)
    section = f"`{file.name}` holds the model in {plan.quant} for llama.cpp and Ollama:\n\n```\n{commands}\n```\n"
    if plan.notes:
        section += "\n" + "".join(f"- {note[0].upper()}{note[1:]}.\n" for note in plan.notes)
    return {"Modelfile": ollama, CARD: card_text(plan.known, section), **plan.known.files}


def _json(value: Any) -> str:
    return json.dumps(dict(value))
