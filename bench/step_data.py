"""The inputs of whole steps: a model with random weights and rows of random words, or the rows of a file.

The rows of a file can be made into rows that share more than the prompt of a pair: see `shared_beginnings`.
"""

import json
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parent.parent / "examples" / "quickstart" / "model"


@dataclass(frozen=True)
class StepShape:
    hidden: int
    layers: int
    vocab: int
    length: int  # tokens of a prompt with its completion
    prompt_share: float
    batch: int  # pairs per step
    rows: int  # pairs in all

    @property
    def what(self) -> str:
        return f"{self.length} tokens, {self.prompt_share:.0%} prompt, V {self.vocab:,}, batch {self.batch}"


def write_model(shape: StepShape, folder: Path) -> None:
    """Write a Llama of these sizes with the quickstart's tokenizer, which has fewer tokens than the vocabulary."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    set_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.hidden // 64),
        num_key_value_heads=max(1, shape.hidden // 128),
        vocab_size=max(shape.vocab, len(tokenizer)),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_rows(shape: StepShape) -> list[dict[str, Any]]:
    """Return pairs as prompt, chosen and rejected messages, whose lengths vary by a quarter around the shape's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    words = sorted(word[1:] for word in tokenizer.get_vocab() if word.startswith("Ġ") and word[1:].isalpha())
    draw = random.Random(0)

    def message(role: str, tokens: float) -> list[dict[str, str]]:
        count = max(1, round(tokens * draw.uniform(0.75, 1.25)))
        return [{"role": role, "content": " ".join(draw.choices(words, k=count))}]

    prompt = shape.length * shape.prompt_share
    rest = shape.length - prompt
    return [
        {"prompt": message("user", prompt)} | {side: message("assistant", rest) for side in ("chosen", "rejected")}
        for _ in range(shape.rows)
    ]


def write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _unfit(message: str) -> Exception:
    """Return the error that the command line shows. Steps of random rows, as on a first GPU, need no command line."""
    import typer

    return typer.BadParameter(message)


# --- rows of a file ---------------------------------------------------------------------------------------------------


def choose_rows(model: str, file: Path, count: int, max_length: int) -> list[dict[str, Any]]:
    """Return the first `count` pairs that fit without a cut, as prompt, chosen and rejected messages."""
    import datasets
    from transformers import AutoTokenizer

    from fastpref.data.rows.auto import detect
    from fastpref.data.rows.content import Paired

    tokenizer = AutoTokenizer.from_pretrained(model)
    table = datasets.load_dataset("json", data_files=str(file), split="train")
    form = detect(table[0])
    if form is None:
        raise _unfit(f"{file}: not a file of pairs")

    def tokens(messages: Any) -> int:
        return len(tokenizer(str(tokenizer.apply_chat_template([*messages], tokenize=False))).input_ids)

    fitting: list[dict[str, Any]] = []
    for raw in table:
        pair = form.read(raw)  # pyright: ignore[reportArgumentType]
        if not isinstance(pair, Paired) or isinstance(pair.prompt, str):
            raise _unfit(f"{file}: chats with chosen and rejected are needed")
        lengths = [tokens([*pair.prompt, *side]) for side in (pair.chosen, pair.rejected)]
        if max(lengths) <= max_length:
            fitting.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected})
        if len(fitting) == count:
            return fitting
    raise _unfit(f"{file}: only {len(fitting)} pairs fit in {max_length} tokens, {count} are wanted")


def split_pairs(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every pair as two rows for KTO."""
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]


def as_text(model: str, pairs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the pairs as text that the model's chat template has written, to which each engine adds the end.

    So every engine has the same tokens: of messages TRL also scores what a template writes after a turn's end, most
    often a newline.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    begins_itself = tokenizer("a").input_ids[0] == tokenizer.bos_token_id

    def written(messages: list[Any], **options: bool) -> str:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        return text.removeprefix(tokenizer.bos_token) if begins_itself else text

    rows = []
    for pair in pairs:
        row = {"prompt": written([*pair["prompt"]], add_generation_prompt=True)}
        for side in ("chosen", "rejected"):
            text = written([*pair["prompt"], *pair[side]])
            if not text.startswith(row["prompt"]):
                raise _unfit(f"{model}: its chat template writes a prompt differently before a completion")
            row[side] = text.removeprefix(row["prompt"]).rstrip().removesuffix(tokenizer.eos_token)
        rows.append(row)
    return rows


def count_tokens(model: str, texts: list[dict[str, str]]) -> tuple[int, int]:
    """Return the tokens of the pairs of `as_text`, without padding: of the prompts, counted twice, and of all.

    They are the same for every engine.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sides = [text["prompt"] + text[side] + tokenizer.eos_token for text in texts for side in ("chosen", "rejected")]
    prompts = sum(map(len, tokenizer([text["prompt"] for text in texts]).input_ids))
    return 2 * prompts, sum(map(len, tokenizer(sides).input_ids))


# --- pairs that share their beginnings --------------------------------------------------------------------------------

_VERBS = {"find": "Searches for", "create": "Creates", "update": "Changes", "cancel": "Cancels"}
_NOUNS = ("invoice", "flight", "ticket", "meeting", "shipment", "customer", "order", "room", "subscription", "refund")


def shared_beginnings(
    pairs: list[dict[str, Any]], tokenizer: Any, tool_tokens: int = 1000, completions: int = 4, turns: int = 4
) -> dict[str, list[dict[str, Any]]]:
    """Return four data sets, each of as many pairs as are given, whose sequences share more and more."""
    return {
        "pairs as they are": pairs,
        "under one tool prompt": under_system_prompt(pairs, tool_prompt(tokenizer, tool_tokens)),
        f"{completions} completions, best against rest": best_against_rest(pairs, completions),
        f"a conversation at each of {turns} turns": each_turn(pairs, turns),
    }


def tool_prompt(tokenizer: Any, tokens: int) -> str:
    """Return a system prompt with the JSON schemas of tools, of `tokens` tokens or a schema more."""
    text = "You are a helpful assistant. You can call these tools:"
    for noun, verb in product(_NOUNS, _VERBS):
        if len(tokenizer(text).input_ids) >= tokens:
            break
        properties = {
            f"{noun}_id": {"type": "string", "description": f"The number of the {noun}, as the customer knows it."},
            "date": {"type": "string", "format": "date", "description": "The day it is about, by default today."},
        }
        schema = {"type": "object", "properties": properties, "required": [f"{noun}_id"]}
        what = f"{_VERBS[verb]} the {noun} of a customer, and returns its state."
        text += "\n" + json.dumps({"name": f"{verb}_{noun}", "description": what, "parameters": schema})
    return text


def under_system_prompt(pairs: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the pairs with `text` as their system prompt, before the one that they have."""
    rows = []
    for pair in pairs:
        system, rest = _system_first(pair["prompt"])
        content = "\n\n".join([text, *(message["content"] for message in system)])
        rows.append(pair | {"prompt": [{"role": "system", "content": content}, *rest]})
    return rows


def best_against_rest(pairs: list[dict[str, Any]], completions: int) -> list[dict[str, Any]]:
    """Return as many pairs, which compare the chosen completion of a prompt with each of its other completions.

    The others are its own rejected completion and those of the pairs that come next.
    """
    rows = [
        pair | {"rejected": pairs[(at + step) % len(pairs)]["rejected"]}
        for at, pair in enumerate(pairs)
        for step in range(completions - 1)
    ]
    return rows[: len(pairs)]


def each_turn(pairs: list[dict[str, Any]], turns: int) -> list[dict[str, Any]]:
    """Return as many pairs, in which `turns` pairs are the turns of one conversation that goes on with the chosen."""
    rows: list[dict[str, Any]] = []
    for at, pair in enumerate(pairs):
        system, rest = _system_first(pair["prompt"])
        prompt = [*rows[-1]["prompt"], *rows[-1]["chosen"], *rest] if at % turns else [*system, *rest]
        rows.append(pair | {"prompt": prompt})
    return rows


def _system_first(messages: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return the system prompt, as a list of at most one message, and the other messages."""
    at = int(bool(messages) and messages[0]["role"] == "system")
    return messages[:at], messages[at:]
