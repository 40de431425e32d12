"""Write a LoRA adapter alone as a GGUF file, for llama.cpp to add to a GGUF file of its base model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor

from fastpref.errors import UserError
from fastpref.export.card import CARD, card_text, general, provenance
from fastpref.export.families import family_of
from fastpref.export.gguf_file import file_size, write_gguf
from fastpref.export.model import Exported
from fastpref.export.place import check_place, check_space, write_together
from fastpref.export.quantise import Written
from fastpref.export.tensors import Piece, TensorNames
from fastpref.export.uses import of_adapter
from fastpref.merge.adapter import adapted, with_adapter
from fastpref.merge.plan import bare_model
from fastpref.model.files import model_config
from fastpref.model.tokenizer import load_tokenizer
from fastpref.run.trained import Trained, trained_tokenizer

_MERGED = "Merge it with fastpref merge, and export the merged model"
_WHOLE = "Export the merged model instead, without --adapter"


def export_adapter(trained: Trained, output: Path | None = None) -> Exported:
    """Write an adapter to a file `output`, in float32. Raises UserError for an adapter that llama.cpp cannot add."""
    if not trained.is_adapter:
        raise UserError(f"{trained.weights}: not an adapter. Export it without --adapter")
    config = model_config(trained.config.model).get_text_config()
    family = family_of(config)
    model = bare_model(trained.config.model)
    tied = _is_tied(model)
    with_adapter(model, trained)
    names = TensorNames(config, family)
    tensors: dict[str, Tensor] = {}
    alpha = None
    for name, part in adapted(model).items():
        if isinstance(part, ModulesToSaveWrapper):
            raise UserError(f"{name} was trained whole, and llama.cpp's adapters hold LoRA only. {_WHOLE}")
        if isinstance(part, TrainableTokensWrapper):
            raise UserError(
                f"{name} has trained rows of new tokens, and llama.cpp's adapters hold LoRA only. {_MERGED}"
            )
        for piece, a, b in _factors(name, part, names.pieces(name), tied=tied):
            scaled = part.scaling[part.active_adapters[0]] * b.shape[-1]  # llama.cpp multiplies by alpha / rank
            if not scaled:
                raise UserError(f"{name}: its lora_alpha is 0, which llama.cpp takes for its rank. {_WHOLE}")
            alpha = scaled if alpha is None else alpha
            tensors[f"{piece.name}.lora_a"] = a.float()
            tensors[f"{piece.name}.lora_b"] = b.float() * (scaled / alpha)
    written = {name: Written(gguf.GGMLQuantizationType.F32, tuple(tensor.shape)) for name, tensor in tensors.items()}
    known = provenance(trained)
    file = output or Path(f"{known.name}-gguf") / f"{known.name}-adapter.gguf"
    settings = [
        ("type", gguf.GGUFType.ADAPTER), *general(known), ("file_type", gguf.LlamaFileType.ALL_F32),
        ("adapter_type", "lora"), ("adapter_alpha", float(alpha or 0.0)),
    ]  # fmt: skip
    notes = tuple(_notes(trained))
    base = trained.config.model.name
    commands = "\n".join(of_adapter(Path(file.name), known.base))
    section = (
        f"`{file.name}` holds the adapter alone, in float32, for a GGUF file of `{known.base}`:\n\n"
        f"```\n{commands}\n```\n"
    ) + "".join(f"\n- {note[0].upper()}{note[1:]}." for note in notes)
    beside = {CARD: card_text(known, section), **known.files}
    check_place(file, beside)
    check_space(file.parent, file_size(written))
    write_together(
        file, lambda path: write_gguf(path, family.arch, settings, written, lambda: iter(tensors.items())), beside
    )
    return Exported(file, file.stat().st_size, {"f32": len(tensors)}, notes, of_adapter(file, base))


def _factors(name: str, part: Any, pieces: list[Piece], *, tied: bool) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """Yield LoRA's factors A [..., rank, in] and B [..., out, rank] of each tensor of the file."""
    adapter = part.active_adapters[0]
    if (variant := part.lora_variant.get(adapter)) is not None:
        kind = type(variant).__name__.removesuffix("Variant").removesuffix("Linear")
        raise UserError(f"{name}: {kind} is more than LoRA, which is all that llama.cpp adds. {_WHOLE}")
    if adapter in part.lora_embedding_A:
        raise UserError(f"{name}: LoRA on embeddings is not written as an adapter. {_WHOLE}")
    if pieces[0].name == "output.weight" and tied:
        raise UserError(f"{name}: a GGUF file of this model has no head of its own to add LoRA to. {_WHOLE}")
    a, b = part.lora_A[adapter].weight.detach(), part.lora_B[adapter].weight.detach()
    if isinstance(part, ParamWrapper) and part.get_param().ndim == 3:  # the experts' factors are in one matrix
        count = part.num_experts
        a, b = a.reshape(count, -1, a.shape[-1]), b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    for piece in pieces:
        yield piece, a, piece.rows(b)


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _notes(trained: Trained) -> Iterator[str]:
    own: Any = load_tokenizer(trained.config.model).chat_template
    if trained_tokenizer(trained).chat_template != own:
        yield (
            "the training wrote text with another chat template than the base model's, which is the one in a GGUF file "
            "of the base: llama-server takes it as --chat-template-file"
        )
    if trained.config.model.quantization == "nf4":
        yield "the adapter was trained on the model in nf4, and a GGUF file of the base is another rounding of it"
