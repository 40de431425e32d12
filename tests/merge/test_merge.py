"""`fastpref merge`: the merged model computes what the adapter computes on its base, whatever kind either is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from fastpref.errors import UserError
from fastpref.memory.allocations import PeakStorage
from fastpref.merge import folder, merge, verify
from fastpref.merge.adapter import adapted, with_adapter
from fastpref.merge.checkpoint import Checkpoint
from fastpref.merge.plan import bare_model, make_plan
from fastpref.run.trained import find_trained
from tests.support.command_line import run_command
from tests.support.paths import QUICKSTART_MODEL

IDS = torch.arange(3, 40)[None]


def base(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, shards: bool = False) -> Path:
    """Save a random Llama with the quickstart's tokenizer, and return its folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=949, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(str(folder), max_shard_size="100KB" if shards else "5GB")
    AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(str(folder))
    return folder


def adapter(model: Path, folder: Path, **options: Any) -> Path:
    """Save a PEFT adapter that has an effect, and return its folder."""
    torch.manual_seed(1)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    settings = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    wrapped = get_peft_model(loaded, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.1)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ranks of their own": ({}, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}),
    "head": ({}, {"target_modules": ["lm_head", "q_proj"]}),
    "tied head": ({"tied": True}, {"target_modules": ["lm_head", "q_proj"]}),
    "tied head, in shards": ({"tied": True, "shards": True}, {"target_modules": ["lm_head", "q_proj"]}),
    "embeddings beside a tied head": ({"tied": True}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "a norm trained whole": ({}, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize(("model", "settings"), KINDS.values(), ids=KINDS)
def test_the_merged_model_is_the_adapter_beside_its_base(tmp_path: Path, model: Any, settings: Any):
    """Logits are equal up to rounding of float32, and so are the generated tokens."""
    begun = base(tmp_path / "base", **model)
    trained = adapter(begun, tmp_path / "adapter", **settings)
    merged = merge(find_trained(str(trained)), tmp_path / "merged")
    theirs: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(begun, dtype=torch.float32), trained)
    ours: Any = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)
    expected = logits(theirs)
    assert (logits(ours) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(begun, dtype=torch.float32)))
    options = {"input_ids": IDS[:, :5], "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(ours.generate(**options), theirs.generate(**options))
    assert not (merged.untied and ours.config.tie_word_embeddings)
    assert AutoTokenizer.from_pretrained(merged.folder).chat_template


def test_a_tied_head_stays_tied_where_it_can(tmp_path: Path):
    """If adapters are only in the body, the head stays tied, in the files and in the config."""
    begun = base(tmp_path / "base", tied=True)
    merged = merge(find_trained(str(adapter(begun, tmp_path / "a", target_modules="all-linear"))), tmp_path / "merged")
    assert not merged.untied
    assert json.loads((merged.folder / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in load_file(merged.folder / "model.safetensors")


def test_half_precision_files_stay_half(tmp_path: Path):
    """bfloat16 files give bfloat16 files, and the logits differ only by rounding."""
    begun = base(tmp_path / "base", dtype=torch.bfloat16)
    trained = adapter(begun, tmp_path / "adapter", target_modules="all-linear")
    merged: Any = merge(find_trained(str(trained)), tmp_path / "merged")
    assert {t.dtype for t in load_file(merged.folder / "model.safetensors").values()} == {torch.bfloat16}
    assert 0 < merged.lost < 0.1
    whole: Any = merge(find_trained(str(trained)), tmp_path / "whole", dtype=torch.float32)
    assert {t.dtype for t in load_file(whole.folder / "model.safetensors").values()} == {torch.float32}
    assert whole.lost < 1e-5


def test_a_model_is_never_held_twice(tmp_path: Path):
    """With shards, only one file's tensors and the current layer are in memory at once."""
    begun = base(tmp_path / "base", shards=True)
    files = [path.stat().st_size for path in begun.glob("*.safetensors")]
    trained = find_trained(str(adapter(begun, tmp_path / "adapter", target_modules="all-linear")))
    model = bare_model(trained.config.model)
    with_adapter(model, trained)
    writer = folder.Writer(make_plan(trained.config.model, Checkpoint(begun), adapted(model), frozenset()))
    (tmp_path / "merged").mkdir()
    with PeakStorage() as memory:
        writer.fill(tmp_path / "merged", trained)
    assert memory.peak < 2.5 * max(files) < sum(files)


def test_of_a_4_bit_run(finished_run: Path, tmp_path: Path):
    """An nf4 run's adapter is merged onto the dequantised weights, with which it was trained, and onto the original
    ones only on request."""
    text = (finished_run / "config.toml").read_text().replace('quantization = "none"', 'quantization = "nf4"')
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(text)
    (run / "final").symlink_to(finished_run / "final")
    trained = find_trained(str(run))
    there: Any = merge(trained, tmp_path / "dequantised")
    assert "dequantised" in there.onto
    assert there.lost < 0.1
    other = merge(trained, tmp_path / "originals", dequantized=False)
    assert "not their nf4 form" in other.onto
    body = "model.layers.0.mlp.up_proj.weight"
    dequantised, original = (load_file(merged.folder / "model.safetensors")[body] for merged in (there, other))
    assert not torch.equal(dequantised, original)
    assert not list(run.glob("*.safetensors"))


def test_the_command(finished_run: Path, tmp_path: Path):
    """The command says what was merged and how exact it is, and does not replace an existing folder."""
    ran = run_command("merge", finished_run, "--output", tmp_path / "merged")
    assert (ran.status, ran.err) == (0, "")
    assert "tensors changed" in ran.out
    assert "of what the adapter changes in the logits" in ran.out
    again = run_command("merge", finished_run, "--output", tmp_path / "merged")
    assert again.status == 2
    assert again.err.startswith(f"fastpref: --output {tmp_path / 'merged'}: is there already")


def test_what_is_refused(finished_run: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each refusal gives its reason, and no folder is left behind."""
    begun = base(tmp_path / "base")
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(begun), settings).save_pretrained(str(tmp_path / "prompts"))
    bias = adapter(begun, tmp_path / "bias", target_modules=["q_proj"], bias="all")
    cases = {whole_run: "not an adapter", bias: "biases", tmp_path / "prompts": "PROMPT_TUNING"}
    for trained, why in cases.items():
        with pytest.raises(UserError, match=why):
            merge(find_trained(str(trained)), tmp_path / "merged")
    with pytest.raises(UserError, match="--dequantized"):
        merge(find_trained(str(finished_run)), tmp_path / "merged", dequantized=True)
    monkeypatch.setattr(folder, "merged", lambda part, name, tensor: tensor * 1.01)  # not the adapter's sum
    with pytest.raises(UserError, match=r"not kept, because \d+% of .* is lost"):
        merge(find_trained(str(finished_run)), tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_a_failure_leaves_nothing(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After a failure the folder does not exist, whether it was half written or not yet compared."""
    for module, name in ((folder, "trained_tokenizer"), (verify, "_base_logits"), (verify, "_merged_logits")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_, **__: 1 / 0)
            with pytest.raises((UserError, ZeroDivisionError)):
                merge(find_trained(str(finished_run)), tmp_path / "merged")
        assert not list(tmp_path.iterdir())


def test_an_adapter_without_effect(tmp_path: Path):
    """An adapter without effect is an error, also without the comparison, because the result would be the base."""
    begun = base(tmp_path / "base")
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")  # B is initially zero
    get_peft_model(AutoModelForCausalLM.from_pretrained(begun), settings).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="changes no weight"):
        merge(find_trained(str(tmp_path / "adapter")), tmp_path / "merged", verify=False)
    assert not (tmp_path / "merged").exists()
