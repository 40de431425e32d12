"""From a chat model to an answer of llama.cpp: supervised, then preferences, merged, as GGUF, and run.

The model and its data are the quickstart's, or those that FASTPREF_CHAT_MODEL (a folder or a name in the hub's cache)
and FASTPREF_PAIRS (a file of pairs) name. llama-cpp-python is not among the dependencies of the tests.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.command_line import succeed
from tests.support.gguf_models import llama, needs_llama
from tests.support.paths import QUICKSTART_MODEL, QUICKSTART_ROWS

pytestmark = [pytest.mark.slow, needs_llama, pytest.mark.usefixtures("elsewhere")]
MODEL = os.environ.get("FASTPREF_CHAT_MODEL", QUICKSTART_MODEL.as_posix())
PAIRS = os.environ.get("FASTPREF_PAIRS", QUICKSTART_ROWS.as_posix())
CONFIG = """
[model]
name = "{model}"
[lora]
rank = 4
[loss]
type = "{loss}"
[[data]]
path = "{pairs}"
rows = 24
[tokens]
max_length = 128
[train]
steps = 3
batch = 4
learning_rate = 5e-3
[output]
dir = "{loss}"
"""
QUESTIONS = ("What is nine plus nine?", "Name a colour.", "Who are you?")
TOKENS = 24


def test_from_supervised_training_to_an_answer_of_llama_cpp():
    """The file of the merged model and a file of the base with the adapter's answer as transformers does.

    Both are in f16, and decode greedily.
    """
    for loss in ("sft", "dpo"):
        Path(f"{loss}.toml").write_text(CONFIG.format(model=MODEL, pairs=PAIRS, loss=loss))
    succeed("train", "sft.toml")
    succeed("train", "dpo.toml", "lora.from=sft")
    succeed("merge", "dpo", "--output", "merged", "--dtype", "float32")
    succeed("export", "merged", "--gguf", "--quant", "f16", "--output", "files/merged.gguf")
    succeed("export", MODEL, "--gguf", "--quant", "f16", "--output", "base/base.gguf")
    succeed("export", "dpo", "--gguf", "--adapter", "--output", "adapter/adapter.gguf")
    tokenizer = AutoTokenizer.from_pretrained("merged")
    model: Any = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    begun: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompts: list[Any] = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    answers = [_answer(model, tokenizer, prompt) for prompt in prompts]
    ids = torch.tensor([tokenizer(prompts[0], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        before, after = begun(ids).logits, model(ids).logits
    assert (after - before).norm() > 0.01 * before.norm()  # the training has an effect
    with_adapter = llama(Path("base/base.gguf"), n_ctx=512, lora_path="adapter/adapter.gguf")
    for reader in (llama(Path("files/merged.gguf"), n_ctx=512), with_adapter):
        for prompt, answer in zip(prompts, answers):
            ids = reader.tokenize(prompt.encode(), add_bos=False, special=True)
            assert ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert _continued(reader, ids, tokenizer.eos_token_id) == answer


def _answer(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "repetition_penalty": 1.0}
    return model.generate(ids, eos_token_id=tokenizer.eos_token_id, **options)[0, ids.shape[1] :].tolist()


def _continued(reader: Any, ids: list[int], eos: int) -> list[int]:
    """Return the tokens that llama.cpp writes after a prompt, with EOS if it ends with that."""
    reader.reset()
    answer: list[int] = []
    for token in reader.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        answer.append(token)
        if token == eos or len(answer) == TOKENS:
            break
    return answer
