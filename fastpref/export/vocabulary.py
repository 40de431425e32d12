"""A tokenizer as llama.cpp takes it: the tokens with their types, merges or scores, and the tokens with a role."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from fastpref.errors import UserError
from fastpref.export.families import Settings
from fastpref.export.pieces import SPACE, is_byte, scores, space_prefix
from fastpref.export.words import is_last_bytes, word_rule

_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # llama.cpp stops at each of them


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's settings in the file, and what llama.cpp does otherwise."""

    settings: tuple[tuple[str, Any], ...]
    notes: tuple[str, ...]
    ends: tuple[str, ...]  # the tokens at which an answer ends


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, ends: Sequence[int]) -> Vocabulary:
    """Describe a tokenizer for a model of `size` embeddings whose answers end with the tokens `ends`.

    Raises UserError for a tokenizer of which llama.cpp would not make the same tokens.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{type(tokenizer).__name__}: only tokenizers with a tokenizer.json are written as GGUF")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"tokenizer.json: its model is {model.get('type')}; BPE is written as GGUF, and SentencePiece's BPE too"
        )
    _check_model(model)
    tokens, types = _tokens(tokenizer, content, size)
    chat = _chat(tokenizer)
    notes = list(_stripped(content, chat))
    if model.get("byte_fallback"):
        settings = _sentencepiece(content, tokens, types)
        prefix = space_prefix(content)
        if prefix is None and not (chat and any(chat.startswith(token) for token in _special(content))):
            raise UserError(
                "tokenizer.json: it puts a space before a text, but not after special tokens as llama.cpp does, and no "
                "chat template begins a text with a special token"
            )
        if prefix is None:
            notes.append("the tokenizer puts a space before a text without a chat template, which llama.cpp does not")
        settings.append(("add_space_prefix", bool(prefix)))
    else:
        settings = [("tokenizer_model", "gpt2"), *_bpe(content, tokens, types)]
        if (content.get("normalizer") or {}).get("type") == "NFC":
            notes.append("the tokenizer composes letters and accents (NFC) first, which llama.cpp does not")
    before, after = _added_ends(tokenizer)
    if before and chat and not chat.startswith(str(tokenizer.bos_token)):
        before = False
        notes.append("no BOS is added to a text without the chat template, because the chat template writes none")
    settings += [*_roles(tokenizer, ends), ("add_bos_token", before), ("add_eos_token", after)]
    names = [tokens[at] for at in ends]
    if len(ends) > len(_ENDS):
        notes.append(f"llama.cpp knows three ends: {', '.join(names[len(_ENDS) :])} must be given as stop words")
    if tokenizer.chat_template:
        template: Any = tokenizer.chat_template
        settings.append(("chat_template", template if isinstance(template, str) else _named(template)))
    return Vocabulary(tuple(settings), tuple(notes), tuple(names))


def _named(templates: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]


def _check_model(model: Mapping[str, Any]) -> None:
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise UserError(f"tokenizer.json: llama.cpp has no {name}, which is {model[name]!r}")
    if not model.get("merges"):
        raise UserError("tokenizer.json: it has no merges, without which llama.cpp reads no vocabulary")


def _tokens(tokenizer: Any, content: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return a token for each embedding, with its type. Embeddings without a token are unused ones."""
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    if known and max(known) >= size:
        raise UserError(f"the tokenizer has token {max(known)} and the model only {size} embeddings")
    taken = set(known.values())
    unused = [f"[PAD{at}]" for at in range(size)]
    if clash := next((token for at, token in enumerate(unused) if at not in known and token in taken), None):
        raise UserError(f"the tokenizer's {clash} has the name of an embedding without a token")
    tokens = [known.get(at, unused[at]) for at in range(size)]
    types = [int(TokenType.NORMAL if at in known else TokenType.UNUSED) for at in range(size)]
    for added in content.get("added_tokens", ()):
        at, text = int(added["id"]), str(added["content"])
        if at >= size or tokens[at] != text:
            raise UserError(f"tokenizer.json: its added token {text!r} is not token {at}")
        special = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        types[at] = int(TokenType.NORMAL if SPACE in text and not added.get("special") else special)
    return tokens, types


def _bpe(content: Mapping[str, Any], tokens: list[str], types: list[int]) -> Settings:
    normalizer = (content.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise UserError(f"tokenizer.json: llama.cpp does not do what its normalizer does, {normalizer}")
    if not is_last_bytes(content.get("pre_tokenizer")):
        raise UserError("tokenizer.json: its tokens are not made of bytes as GPT-2's are, which llama.cpp expects")
    yield "tokenizer_pre", word_rule(content)
    yield "token_list", tokens
    yield "token_types", types
    yield "token_merges", [" ".join(pair) for pair in _merges(content["model"])]


def _sentencepiece(content: Mapping[str, Any], tokens: list[str], types: list[int]) -> list[tuple[str, Any]]:
    model = content["model"]
    if model.get("ignore_merges"):
        raise UserError("tokenizer.json: llama.cpp has no ignore_merges for tokens with byte_fallback")
    if any(f"<0x{byte:02X}>" not in model["vocab"] for byte in range(256)):
        raise UserError("tokenizer.json: byte_fallback needs all of <0x00> to <0xFF> among the tokens")
    added = {str(token["content"]) for token in content.get("added_tokens", ())}
    rank = scores(model["vocab"], _merges(model), added)
    lowest = -float(len(rank)) - 1
    for at, token in enumerate(tokens):
        if is_byte(token):
            types[at] = int(TokenType.BYTE)
        elif token == model.get("unk_token"):
            types[at] = int(TokenType.UNKNOWN)
    return [
        ("tokenizer_model", "llama"),
        ("tokenizer_pre", "default"),
        ("token_list", tokens),
        ("token_scores", [rank.get(token, lowest) for token in tokens]),
        ("token_types", types),
    ]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if odd := next((pair for pair in pairs if len(pair) != 2 or any(" " in part for part in pair)), None):
        raise UserError(f"tokenizer.json: a merge of {odd} cannot be written")
    return [(pair[0], pair[1]) for pair in pairs]


def _roles(tokenizer: Any, ends: Sequence[int]) -> Settings:
    """Yield the tokens with a role. Chat templates write BOS and EOS by these, so EOS is the tokenizer's."""
    for name in ("bos", "unk", "pad", "sep", "mask"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            yield f"{name}_token_id", number
    yield from zip(_ENDS, ends)


def _added_ends(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether the tokenizer adds BOS and EOS to every text. Raises UserError if it adds anything else."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before = bos is not None and ids[:1] == [bos] and plain[:1] != [bos]
    after = eos is not None and ids[-1:] == [eos] and plain[-1:] != [eos]
    if ids != [*[bos] * before, *plain, *[eos] * after]:
        raise UserError("the tokenizer puts other tokens than BOS and EOS around a text, which llama.cpp does not")
    return before, after


def _chat(tokenizer: Any) -> str | None:
    """Return a conversation as the chat template writes it, or None if there is none."""
    talk = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    try:
        return str(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    except Exception:  # there is no template, or it does not know such a conversation
        return None


def _special(content: Mapping[str, Any]) -> list[str]:
    return [str(token["content"]) for token in content.get("added_tokens", ()) if token.get("special")]


def _stripped(content: Mapping[str, Any], chat: str | None) -> Iterator[str]:
    """Yield a note on tokens that drop spaces beside them. Raises UserError if that changes a conversation's tokens."""
    added = content.get("added_tokens", ())
    stripping = [str(token["content"]) for token in added if token.get("lstrip") or token.get("rstrip")]
    if not stripping:
        return
    shown = ", ".join(stripping[:3]) + (" …" if len(stripping) > 3 else "")
    keeping = dict(content) | {"added_tokens": [dict(token) | {"lstrip": False, "rstrip": False} for token in added]}
    ids = [
        Tokenizer.from_str(json.dumps(each)).encode(chat or "", add_special_tokens=False).ids
        for each in (content, keeping)
    ]
    if ids[0] != ids[1]:
        raise UserError(
            f"the tokenizer drops spaces beside {shown} in what the chat template writes, and llama.cpp keeps them, so "
            "that it would read other tokens than the training"
        )
    yield f"the tokenizer drops spaces beside {shown}, which llama.cpp keeps; the chat template writes none there"
