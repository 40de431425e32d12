"""A model of random weights and rows of random words, for whole steps without a hub and with every size at will."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parent.parent / "examples" / "quickstart" / "model"


@dataclass(frozen=True)
class StepShape:
    hidden: int
    layers: int
    vocab: int
    length: int  # tokens of a prompt with its response
    prompt_share: float
    batch: int  # pairs a step
    rows: int  # pairs in all

    def but(self, **changes: Any) -> "StepShape":
        return replace(self, **changes)

    @property
    def what(self) -> str:
        return f"{self.length} tokens, {self.prompt_share:.0%} prompt, V {self.vocab:,}, batch {self.batch}"


def write_model(shape: StepShape, folder: Path) -> None:
    """A Llama of these sizes with the quickstart's tokenizer, whose words are fewer than the vocabulary."""
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
    """Pairs as prompt, chosen and rejected messages; lengths vary by a quarter about the shape's."""
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
        {
            "prompt": message("user", prompt),
            "chosen": message("assistant", rest),
            "rejected": message("assistant", rest),
        }
        for _ in range(shape.rows)
    ]


def write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
