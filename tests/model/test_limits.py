"""Before anything is computed, each row's token ids are compared with the embeddings, and its length with the
positions. The limits are those at which the models themselves fail."""

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from fastpref.data.table import Examples
from fastpref.model.limits import limits_of_config, limits_of_model
from tests.support.command_line import CommandResult, run_command
from tests.support.paths import QUICKSTART_MODEL

POSITIONS = 24
COMMON: dict[str, Any] = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
BERT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS, "is_decoder": True,
}  # fmt: skip
BART: dict[str, Any] = {
    "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "encoder_layers": 1,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "max_position_embeddings": POSITIONS,
}  # fmt: skip
LLAMA: dict[str, Any] = BERT | {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[dict[str, Any], int | None]] = {
    "gpt2": (GPT, POSITIONS),
    "gpt_bigcode": (GPT, POSITIONS),
    "openai-gpt": (GPT, POSITIONS),
    "gptj": (GPT | {"rotary_dim": 4}, POSITIONS),
    "codegen": (GPT | {"n_head": 4, "rotary_dim": 4}, POSITIONS),
    "ctrl": (GPT | {"dff": 16}, POSITIONS),
    "gpt_neo": (
        {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]],
         "max_position_embeddings": POSITIONS},
        POSITIONS,
    ),
    "opt": (BERT | {"ffn_dim": 16, "word_embed_proj_dim": 16}, POSITIONS),
    "biogpt": (BERT, POSITIONS),
    "bert": (BERT, POSITIONS),
    "bert-generation": (BERT, POSITIONS),
    "electra": (BERT | {"embedding_size": 16}, POSITIONS),
    "megatron-bert": (BERT, POSITIONS),
    "roberta": (BERT, POSITIONS - 1),
    "camembert": (BERT, POSITIONS - 1),
    "xlm-roberta": (BERT, POSITIONS - 1),
    "bart": (BART, POSITIONS),
    "mbart": (BART, POSITIONS),
    "marian": (BART | {"decoder_start_token_id": 0}, POSITIONS),
    "mpt": ({"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": POSITIONS}, POSITIONS),
    "xglm": ({"d_model": 16, "ffn_dim": 16, "num_layers": 1, "attention_heads": 2,
              "max_position_embeddings": POSITIONS}, None),
    "bloom": ({"hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
    "llama": (LLAMA, None),
    "gpt_neox": (LLAMA, None),
    "qwen3": (LLAMA | {"head_dim": 8}, None),
    "phi": (LLAMA, None),
    "falcon": ({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "max_position_embeddings": POSITIONS}, None),
    "mamba": ({"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}, None),
}  # fmt: skip


def architecture(kind: str) -> PretrainedConfig:
    return CONFIG_MAPPING[kind](**COMMON | FAMILIES[kind][0])


@torch.no_grad()
def computes(model: Any, tokens: int) -> bool:
    """Return whether the model itself can compute so many tokens, with its default positions."""
    try:
        model(input_ids=torch.full((1, tokens), 3))
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("kind", FAMILIES)
def test_positions_are_those_that_the_model_can_compute(kind: str):
    """The model can compute as many tokens as its limit and not one more; config.json gives the same limit."""
    model = AutoModelForCausalLM.from_config(architecture(kind)).eval()
    limits, expected = limits_of_model(model), FAMILIES[kind][1]
    assert limits.positions == limits_of_config(architecture(kind).to_dict()).positions == expected
    assert computes(model, expected or 3 * POSITIONS)
    assert expected is None or not computes(model, expected + 1)
    assert (limits.embeddings, limits.outputs) == (50, 50)


ROPE: dict[str, tuple[dict[str, Any], int | None]] = {
    "as it is": ({}, 4096),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}, 16384),
    "yarn, counted already": (
        {"max_position_embeddings": 16384,
         "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}},
        16384,
    ),
    "llama3": (
        {"max_position_embeddings": 131072,
         "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}},
        131072,
    ),
    "longrope": (
        {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
         "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        131072,
    ),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, None),
    "one a kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0},
                             "sliding_attention": {"rope_type": "default"}}},
        32768,
    ),
    "no scaling": ({"rope_scaling": None}, 4096),
    "inside another model": ({"text_config": {"max_position_embeddings": 2048, "vocab_size": 7}}, 2048),
}  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), ROPE.values(), ids=ROPE)
def test_what_rope_was_made_for(config: dict[str, Any], expected: int | None):
    """The length that RoPE was made for includes scaling: for YaRN, the trained length times the factor."""
    limits = limits_of_config({"model_type": "llama", "vocab_size": 50, "max_position_embeddings": 4096} | config)
    assert (limits.made_for, limits.positions) == (expected, None)


# --- Through the commands --------------------------------------------------------------------------------------------


def project(folder: Path, model: PretrainedConfig, *, more_tokens: int = 0, **lines: Any) -> Path:
    """Write a config, a random model, four pairs and one held-out pair; the third is long and ends in a new token."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model).save_pretrained(folder / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    tokenizer.add_tokens([f"<new{i}>" for i in range(more_tokens)])
    if more_tokens:
        tokenizer.pad_token = "<new0>"
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": "four plus five", "chosen": "nine", "rejected": "no"} for _ in range(4)]
    rows[2] = {"prompt": "plus " * 20, "chosen": "nine " * 9 + "<new1>", "rejected": "no"}
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "held.jsonl").write_text(json.dumps(rows[0]))
    path = folder / "cfg.toml"
    path.write_text(
        '[model]\nname = "model"\n[lora]\nrank = 2\n[[data]]\npath = "pairs.jsonl"\n[tokens]\nduplicates = "keep"\n'
        '[[eval.data]]\npath = "held.jsonl"\n[eval]\nsamples = 1\n[train]\nsteps = 1\nbatch = 2\nlearning_rate = 1e-3\n'
        '[output]\ndir = "run"\n'
    )
    return path


LLAMA_949 = CONFIG_MAPPING["llama"](**{**LLAMA, **COMMON, "vocab_size": 949})


def gpt2(positions: int) -> PretrainedConfig:
    return CONFIG_MAPPING["gpt2"](**{**GPT, **COMMON, "vocab_size": 949, "n_positions": positions})


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> CommandResult:
        ran = run_command(*arguments)
        return CommandResult(ran.status, " ".join(ran.out.split()), " ".join(ran.err.split()))

    return run


ROW_3 = r"pairs\.jsonl:3: \d\d tokens with its completion, and gpt2 has 24 positions; 1 of 4 training rows has more"
TOO_LONG = {  # command: its status and its message about a row that is longer than the model's positions
    "check": (0, "tokens.max_length = 2,048 is more than the 24 positions of gpt2: longer rows are refused"),
    "preview": (2, ROW_3),
    "train": (2, ROW_3),
    "estimate": (0, "ends before its first step: .*" + ROW_3),
}
NO_EMBEDDING = {
    "check": (0, "has ids up to 950, and vocab_size of its config.json is 949"),
    "preview": (2, "pairs.jsonl:3: token 950 ('<new1>') of its completion is not in the embeddings of llama, which "
                   "have 949 rows; 1 of 4 training rows has such tokens, and the tokenizer has 951"),
    "train": (2, "pairs.jsonl:3: token 950 ('<new1>') of its completion"),
    "estimate": (0, "ends before its first step: {folder}/pairs.jsonl:3: token 950 ('<new1>') of its completion"),
}  # fmt: skip
AS_IT_IS = {"estimate": ["--cpu"]}


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_row_longer_than_the_positions(run: Any, tmp_path: Path, name: str):
    """Before anything is written, the message gives both numbers, the row and the key, with which it then runs."""
    path = project(tmp_path, gpt2(POSITIONS))
    status, said = TOO_LONG[name]
    ran = run(name, str(path), *AS_IT_IS.get(name, []))
    assert ran.status == status
    assert re.search(said, ran.err + ran.out), ran
    assert "tokens.max_length=24" in ran.err + ran.out
    assert not (tmp_path / "run").exists()
    assert run(name, str(path), *AS_IT_IS.get(name, []), "tokens.max_length=24").status == 0


@pytest.mark.parametrize("name", NO_EMBEDDING)
def test_a_token_without_an_embedding(run: Any, tmp_path: Path, name: str):
    """The message gives the row, the token's id and text, both numbers, and the remedy."""
    path = project(tmp_path, LLAMA_949, more_tokens=2)
    status, said = NO_EMBEDDING[name]
    ran = run(name, str(path), *AS_IT_IS.get(name, []))
    assert ran.status == status
    assert said.format(folder=tmp_path) in ran.err + ran.out
    assert "resize_token_embeddings" in ran.err + ran.out
    assert not (tmp_path / "run").exists()


def test_in_the_prompt_and_in_held_out_rows(run: Any, tmp_path: Path):
    """Prompts and held-out rows are compared too."""
    path = project(tmp_path, LLAMA_949, more_tokens=2)
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text().replace("<new1>", ""))
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "a <new1>", "chosen": "b", "rejected": "c"}))
    said = run("train", str(path)).err
    assert "held.jsonl:1: token 950 ('<new1>') of its prompt" in said
    assert "1 of 1 held-out rows has" in said


def test_a_pad_token_without_an_embedding_does_no_harm(run: Any, tmp_path: Path):
    """Padding is masked, so the loss is that of the tokenizer without the pad token, and a note says so."""
    logged = []
    for more in (0, 2):
        folder = tmp_path / str(more)
        folder.mkdir()
        path = project(folder, LLAMA_949, more_tokens=more)
        for name in ("pairs.jsonl", "held.jsonl"):
            (folder / name).write_text((folder / name).read_text().replace("<new1>", ""))
        ran = run("train", str(path), "train.layout=padded", f"output.dir={folder}/run")
        assert ran.status == 0
        assert ("pad token, 949 ('<new0>'), has no embedding" in ran.out) == (more == 2)
        logged.append(json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[1])["loss"])
    assert logged[0] == logged[1]


def test_ktos_other_completions_have_positions_too(run: Any, tmp_path: Path):
    """For KTO, each prompt plus the longest paired completion of another row must fit, as the run's steps pair them."""
    path = project(tmp_path, gpt2(40))
    rows = [{"prompt": "plus " * (1 if i % 2 else 25), "completion": "nine " * (25 if i % 2 else 1), "label": i < 2}
            for i in range(4)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows[1::2])))
    ran = run("train", str(path), "loss.type=kto", "train.batch=4")
    assert ran.status == 2
    assert "its prompt with the completion of another row" in ran.err
    assert "gpt2 has 40 positions. Set tokens.max_length=20" in ran.err
    assert run("train", str(path), "loss.type=kto", "train.batch=4", "tokens.max_length=20").status == 0
    assert run("train", str(path), "loss={type='kto',kl='none'}", "output.dir=none").status == 0


def test_rows_that_fit_leave_room_for_a_short_answer(run: Any, tmp_path: Path):
    """If a prompt nearly fills the positions, its answer gets what is left of them."""
    path = project(tmp_path, gpt2(26))
    held = {"prompt": "plus " * 20, "chosen": "nine", "rejected": "no"}
    (tmp_path / "held.jsonl").write_text(json.dumps(held))
    assert run("train", str(path), "tokens.max_length=26", "eval.sample_tokens=64").status == 0
    ran = run("eval", "run", "--data", "pairs.jsonl", "tokens.max_length=64")
    assert ran.status == 2
    assert "and gpt2 has 26 positions" in ran.err


def test_rows_beyond_what_rope_was_made_for_are_counted(run: Any, tmp_path: Path):
    """Rows beyond the length that RoPE was made for are computed, with a note unless the scaling covers them."""
    path = project(tmp_path, LLAMA_949)
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text().replace("<new1>", ""))
    ran = run("train", str(path))
    assert ran.status == 0
    assert "1 of 4 training rows has more tokens than the 24 that llama was made for" in ran.out
    assert "pairs.jsonl:3. They are computed" in ran.out
    assert "more tokens than the 24" in run("preview", str(path)).out
    assert "more than the 24 tokens that llama was made for" in run("check", str(path)).out
    other = json.loads((tmp_path / "model" / "config.json").read_text())
    other["rope_parameters"] |= {"rope_type": "linear", "factor": 100.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(other))
    assert "was made for" not in run("preview", str(path)).out
    assert "note" not in run("check", str(path)).out


def test_tokens_are_compared_without_reading_rows():
    """Half a million rows take less than a second, because columns are compared instead of rows."""
    count, each = 500_000, 40
    ids = pa.array(np.arange(count * each, dtype=np.int32) % 900)
    lists = pa.ListArray.from_arrays(pa.array(np.arange(0, count * each + 1, each, dtype=np.int32)), ids)
    pairs = pa.ListArray.from_arrays(pa.array(np.arange(0, count + 1, 2, dtype=np.int32)), lists)
    examples = Examples(pa.table({"prompt": lists.slice(0, count // 2), "completions": pairs}))
    began = time.perf_counter()
    assert examples.highest_ids == (899, 899)
    assert time.perf_counter() - began < 1
    places, found = examples.with_ids_from(899, False)
    assert (places[0], found[0]) == (899 // (2 * each), 899)
