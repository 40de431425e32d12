"""transformers' own GGUF loader reads the files back: the weights, the tokenizer and the settings."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastpref.export import export_model
from fastpref.export.quantise import QUANTS, choose, quantised, rounding
from fastpref.run.trained import find_trained
from tests.support.gguf_models import logits, save_model
from tests.support.paths import QUICKSTART_MODEL

READ = [  # of the families that transformers reads; it has no gemma, olmo2 and granite, and reads mistral as llama
    "llama", "llama, tied", "llama, biases", "llama, one head per key", "llama, yarn", "llama, linear", "qwen2",
    "qwen3", "qwen3, tied", "qwen2_moe", "qwen3_moe", "phi3", "gemma2", "gemma3_text",
]  # fmt: skip
ALONE = ["llama", "llama, tied", "llama, one head per key", "mistral", "qwen2", "phi3"]  # it reads every setting
_SHAPES = [(3, 64), (5, 96), (2, 3, 32)]


@pytest.mark.parametrize(("name", "alone"), [*((name, False) for name in READ), *((name, True) for name in ALONE)])
def test_a_family_is_read_back(name: str, alone: bool, tmp_path: Path):
    """The model that transformers reads from the file has the logits of the model that was written.

    With `alone` it also takes the config from the file. It does not read every setting of the other families.
    """
    folder = save_model(name, tmp_path / "model")
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    file = export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf", quant="f32").file
    options = {} if alone else {"config": AutoConfig.from_pretrained(folder)}
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    assert (logits(read) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_the_tokenizer_is_read_back(tmp_path: Path):
    """The tokenizer that transformers reads makes the same tokens, and has the same chat template and ends."""
    folder = save_model("llama", tmp_path / "model")
    file = export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf").file
    before = AutoTokenizer.from_pretrained(folder)
    after = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts = ["Hello world, it's 2024!\n\n  x=1 ünïcødé 漢字", "<|im_start|>user\nhi<|im_end|>\n"]
    assert [after(text)["input_ids"] for text in texts] == [before(text)["input_ids"] for text in texts]
    assert after.chat_template == before.chat_template
    assert (after.eos_token, after.bos_token) == (before.eos_token, before.bos_token)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_tensor_is_rounded_within_the_bound_of_its_type(quant: str):
    """What is read back of random tensors, of large and of tiny ones, differs by no more than the format's rounding."""
    torch.manual_seed(0)
    kind = QUANTS[quant][0]
    for shape in _SHAPES:
        for size in (1.0, 1e3, 1e-3, 1e-6):
            tensor = size * torch.randn(shape)
            tensor[..., 0] = 0.0
            tensor[0] = 0.0
            read = gguf.quants.dequantize(
                quantised("x.weight", tensor, choose("blk.0.ffn_up.weight", shape, quant)), kind
            )
            error, bound = np.abs(read - tensor.numpy()), rounding(tensor.numpy(), kind)
            assert (error <= bound * (1 + 1e-6)).all()
            if kind is not Type.F32 and size == 1.0:
                assert error.max() > 0.2 * bound.max()  # the bound is not far off


@pytest.mark.parametrize("quant", QUANTS)
def test_every_tensor_of_a_file_is_within_its_bound(quant: str, tmp_path: Path):
    """Each tensor of a file is within the bound of the type that the file says it has; norms are exact."""
    folder = save_model("qwen3", tmp_path / "model")
    trained = find_trained(str(folder))
    exact = _tensors(export_model(trained, tmp_path / "exact" / "model.gguf", quant="f32").file)
    written = export_model(trained, tmp_path / "out" / "model.gguf", quant=quant)
    rounded = _tensors(written.file)
    assert exact.keys() == rounded.keys()
    for name, (kind, values) in rounded.items():
        before = exact[name][1]
        assert (np.abs(values - before) <= rounding(before, kind) * (1 + 1e-6)).all(), name
        assert kind is Type.F32 if values.ndim == 1 else quant == "f32" or kind is not Type.F32, name
    assert written.types == {k: n for k, n in written.types.items() if n > 0}


def test_rows_that_are_no_multiple_of_a_block_are_half_precision(tmp_path: Path):
    """They are written in f16, the others are quantised, and a note counts them."""
    folder = save_model("llama", tmp_path / "model", intermediate_size=72)
    written = export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf", quant="q4_0")
    kinds = {name: kind for name, (kind, _) in _tensors(written.file).items()}
    assert kinds["blk.0.ffn_down.weight"] is Type.F16
    assert kinds["blk.0.ffn_up.weight"] is Type.Q4_0
    assert kinds["token_embd.weight"] is kinds["output.weight"] is Type.Q8_0
    assert any("2 of 21 tensors are f16" in note for note in written.notes)


def test_the_settings_of_a_file(tmp_path: Path):
    """The file names its family, sizes, tokens with a role and the rule for words, which is GPT-2's here."""
    folder = save_model("llama", tmp_path / "model")
    fields = _fields(export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf").file)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "model"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 16
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def _tensors(file: Path) -> dict[str, tuple[Type, np.ndarray]]:
    reader = gguf.GGUFReader(file)
    return {t.name: (t.tensor_type, gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}


def _fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
