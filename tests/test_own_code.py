"""A model with its own code that selects its attention from a table by name, as many models of the hub do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fastpref
from tests.support import trl_runs
from tests.support.command_line import succeed
from tests.support.paths import QUICKSTART_MODEL, QUICKSTART_ROWS
from tests.support.trl_runs import Run, fit, residuals, train, unpatched

CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class MyConfig(PretrainedConfig):
    model_type = "my_own"

    def __init__(
        self, vocab_size=949, hidden_size=32, heads=4, num_hidden_layers=2, max_position_embeddings=512, **kwargs
    ):
        self.vocab_size, self.hidden_size, self.heads = vocab_size, hidden_size, heads
        self.num_hidden_layers, self.max_position_embeddings = num_hidden_layers, max_position_embeddings
        super().__init__(**kwargs)


class MyAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, mask):
        b, t, h = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        return self.out(self.mix(q, k, v, mask).transpose(1, 2).reshape(b, t, h))

    def mix(self, q, k, v, mask):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask
        return scores.softmax(-1) @ v


class MySdpaAttention(MyAttention):
    def mix(self, q, k, v, mask):
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


CLASSES = {"eager": MyAttention, "sdpa": MySdpaAttention}


class MyLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.attention = CLASSES[config._attn_implementation](config)
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, x, mask):
        x = x + self.attention(self.norm(x), mask)
        return x + self.down(torch.relu(self.up(x)))


class MyPreTrainedModel(PreTrainedModel):
    config_class = MyConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["MyLayer"]
    supports_gradient_checkpointing = True  # and no layer for it


class MyModel(MyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(MyLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        b, t = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(t)[None]
        x = self.embed(input_ids) + self.places(position_ids)
        mask = torch.full((t, t), torch.finfo(x.dtype).min).triu(1)[None, None].expand(b, 1, t, t)
        if attention_mask is not None:
            mask = mask.masked_fill(attention_mask[:, None, None] == 0, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, mask)
        return BaseModelOutputWithPast(last_hidden_state=x)


class MyForCausalLM(MyPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = MyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
"""


def make(folder: Path, vocabulary: int = 949) -> Path:
    """Save a random model of this code with the quickstart's tokenizer, and return its folder."""
    folder.mkdir()
    (folder / "modeling_my.py").write_text(CODE)
    settings = {
        "model_type": "my_own", "architectures": ["MyForCausalLM"], "tie_word_embeddings": False,
        "vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 2,
        "auto_map": {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("adapters", [True, False], ids=["LoRA", "full"])
def test_every_command(adapters: bool, tmp_path: Path):
    """Every command works: estimate, train on padded rows, eval, chat, and merge, which copies the model's code."""
    model, run = make(tmp_path / "model"), tmp_path / "run"
    path = tmp_path / "cfg.toml"
    path.write_text(
        f'[model]\nname = "{model.as_posix()}"\ntrust_remote_code = true\n'
        f'[[data]]\npath = "{QUICKSTART_ROWS.as_posix()}"\nrows = 24\n[eval]\nfraction = 0.25\n'
        f'samples = 0\n[train]\nsteps = 2\nbatch = 4\nlearning_rate = 1e-3\n[output]\ndir = "{run.as_posix()}"\n'
        + ("[lora]\nrank = 4\n" if adapters else "")
    )
    assert "fits" in succeed("estimate", path).out
    assert "layout padded, because the attention of my_own models is their own code" in succeed("train", path).out
    assert succeed("eval", run, "--json").json["loss"] > 0
    succeed("chat", run, "--max-tokens", "3", given="What is four plus five?")
    if not adapters:
        return
    succeed("merge", run, "--output", tmp_path / "merged")
    assert (tmp_path / "merged" / "modeling_my.py").is_file()
    arguments = ("--data", QUICKSTART_ROWS, "--json")
    merged = succeed("eval", tmp_path / "merged", "model.trust_remote_code=true", *arguments).json
    assert merged["logps/chosen"] == pytest.approx(succeed("eval", run, *arguments).json["logps/chosen"], rel=1e-4)


@pytest.mark.parametrize("lora", [True, False])
def test_a_patched_run_is_trls(lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The patch keeps rows padded, and every number is TRL's."""
    folder = make(tmp_path / "model", len(trl_runs.tokenizer()))

    def own(kind: str, root: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)

    monkeypatch.setattr(trl_runs, "make_model", own)
    run = fit(Run("DPO", ["sigmoid"], lora=lora, precomputed=not lora, kind="own code"))  # TRL cannot load a copy of it
    theirs = unpatched(run, tmp_path)
    with fastpref.patch(trl) as patch:
        residuals(train(run, tmp_path), theirs)
    assert any("rows stay padded" in note for note in patch.notes)
