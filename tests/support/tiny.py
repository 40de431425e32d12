"""Very small random models of several kinds, and random examples, for tests of everything above the kernels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DbrxConfig,
    DogeConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fastpref.config import Config, load_config
from fastpref.data.example import Example, Origin, Spans

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}  # fmt: skip
VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
_ROUTED: dict[str, Any] = {"router_aux_loss_coef": 0.5, "output_router_logits": True}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip
_DBRX: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "tie_word_embeddings": False,
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
}  # fmt: skip
_WIDE: dict[str, Any] = SIZES | {"head_dim": 32}  # FlexAttention's kernels need heads of at least 16
_GEMMA: dict[str, Any] = {"sliding_window": 5, "query_pre_attn_scalar": 8}


def model_config(kind: str) -> PretrainedConfig:
    configs = {
        "llama": lambda: LlamaConfig(**SIZES),
        "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
        "llama-dynamic": lambda: LlamaConfig(
            **{**SIZES, "max_position_embeddings": 30},
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        ),
        "phi3-longrope": lambda: Phi3Config(**SIZES, original_max_position_embeddings=30, rope_parameters=_LONGROPE),
        "llama-wide": lambda: LlamaConfig(**_WIDE),
        "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "qwen3": lambda: Qwen3Config(**SIZES),
        "mistral": lambda: MistralConfig(**SIZES, sliding_window=6),
        "gemma2": lambda: Gemma2Config(
            **SIZES, **_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, initializer_range=0.3
        ),
        "gemma3": lambda: Gemma3TextConfig(**SIZES, **_GEMMA, layer_types=["sliding_attention", "full_attention"]),
        "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.25),
        "gpt-oss": lambda: GptOssConfig(
            **SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=4, initializer_range=0.3
        ),
        "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5),
        "qwen3-moe": lambda: Qwen3MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, router_aux_loss_coef=0.5
        ),
        "dbrx": lambda: DbrxConfig(**_DBRX, **_ROUTED),
        "doge-moe": lambda: DogeConfig(**SIZES, **_ROUTED, is_moe=True, num_experts=16, num_experts_per_tok=2),
        "falcon-h1": lambda: FalconH1Config(**SIZES, **MAMBA),
        "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "hyperclovax": lambda: HyperCLOVAXConfig(**SIZES, logits_scaling=0.25),
        "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "mamba": lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2),
    }
    return configs[kind]()


def save_model(kind: str, folder: Path, seed: int = 0, *, layers: int = 2) -> Path:
    """Write a random float32 model of a kind to a folder, and return the folder."""
    torch.manual_seed(seed)
    config: Any = model_config(kind)
    if layers != 2:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * layers)[:layers]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # move away from the shrunken initial weights, whose logits are nearly equal
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def config_for(model: Path, *overrides: str) -> Config:
    """Return a config with the model; its data are never read."""
    path = model / "run.toml"
    path.write_text('[model]\nname = "."\n[[data]]\npath = "none.jsonl"\n')
    return load_config(path, overrides)


def unlabelled(labelled: Sequence[Example]) -> list[Example]:
    """Return single completions without their labels, as supervised training takes them."""
    return [replace(example, label=None) for example in labelled]


def examples(count: int, *, seed: int = 0, single: bool = False, turns: bool = False) -> list[Example]:
    """Return random examples of unaligned lengths: pairs, or single labelled completions.

    With `turns`, most completions have one to three spans that are not scored, before their last token.
    """
    rng = Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]

    def spans(length: int) -> Spans:
        edges = sorted(rng.sample(range(length), min(length // 2, rng.randint(0, 3)) * 2))
        return tuple(zip(edges[::2], edges[1::2]))

    result = []
    for at in range(count):
        label = at % 3 != 0 if single else None
        completions = tuple(ids(1, 13) for _ in range(1 if single else 2))
        contexts = tuple(spans(len(completion)) for completion in completions) if turns else ()
        result.append(Example(ids(1, 17), completions, label, Origin(f"row {at}"), contexts if any(contexts) else ()))
    return result


def sharing_examples(count: int, *, single: bool = False, turns: bool = False) -> list[Example]:
    """Return the examples of `examples` with what examples may have in common.

    A system prompt, nested in it a longer one, equal prompts, equal completions, a completion that begins with another
    one, completions with a common beginning, a prompt of one token, and one that continues another row's answer.
    """
    rows = examples(count, single=single, turns=turns)
    system, longer, answer = ([3 + (7 * at + first) % 90 for at in range(20)] for first in (1, 40, 77))
    for at, row in enumerate(rows):
        prompt = (system + longer if at % 2 else system) + row.prompt if at % 4 != 3 else row.prompt[:1]
        first, *others = row.completions
        if at % 3 == 0:
            first = answer + first
            others = [answer + ids for ids in others]
        rows[at] = replace(row, prompt=prompt, completions=(first, *others))
    if count > 5:
        own, other = rows[1], rows[2]
        rows[4] = replace(rows[4], prompt=own.prompt, completions=(own.completions[0], *rows[4].completions[1:]))
        longer_answer = (other.completions[0] + [5, 9], *rows[5].completions[1:])
        rows[5] = replace(rows[5], prompt=other.prompt, completions=longer_answer)
        rows[0] = replace(rows[0], prompt=own.prompt + own.completions[0] + rows[0].prompt)
    return [replace(row, contexts=row.contexts if _fit(row) else ()) for row in rows]


def sharing_lists(count: int, *, turns: bool = False) -> list[Example]:
    """Return the examples of `sharing_examples` as lists of one to four completions with scores, some of them equal."""
    pairs, others = sharing_examples(count, turns=turns), examples(count, seed=5)
    rows = []
    for at, (pair, other) in enumerate(zip(pairs, others)):
        size = (2, 3, 4, 3, 1)[at % 5]
        parts = [(pair, 0), (pair, 1), (other, 0), (other, 1)][:size]
        scores = [(1.0, 2.0, 3.5, -1.0), (0.5, 0.25, 0.5, 0.5)][at % 2][:size]
        rows.append(replace(pair.with_completions(parts), scores=scores))
    return rows


def with_extras(rows: list[Example], *, weights: bool = True, margins: bool = True) -> list[Example]:
    """Return the examples with weights, one of them 0, and margins, one of them absent."""
    return [
        replace(
            row,
            weight=(1.0, 2.5, 0.3, 0.0)[at % 4] if weights else 1.0,
            margin=(0.2, None, 1.3, -0.4, 0.0)[at % 5] if margins else None,
        )
        for at, row in enumerate(rows)
    ]


def _fit(row: Example) -> bool:
    return all(not spans or spans[-1][1] < len(ids) for spans, ids in zip(row.contexts, row.completions))
