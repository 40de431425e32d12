"""What an export writes of a run, an adapter and a model, and what it refuses before it writes anything."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig

from fastpref import atomic
from fastpref.errors import UserError
from fastpref.export import default_output, export_adapter, export_model, gguf_file, place
from fastpref.export.model import plan_model
from fastpref.memory.allocations import PeakStorage
from fastpref.merge import merge
from fastpref.run.trained import find_trained
from tests.support.command_line import run_command
from tests.support.gguf_models import save_model

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")


def adapter_of(model: Path, folder: Path, **options: Any) -> Path:
    """Save a PEFT adapter that has an effect, and return its folder."""
    torch.manual_seed(1)
    settings: Any = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def tensors(file: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file, dequantised."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "DoRA": ("llama", {"use_dora": True}),
    "a tied head": ("llama, tied", {"target_modules": ["lm_head", "q_proj"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "a norm trained whole": ("gemma2", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "experts": ("qwen3_moe", {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": ["q_proj"]}),
    "fused layers": ("phi3", {}),
}


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_an_adapter_is_merged_as_merge_does(name: str, options: dict[str, Any], tmp_path: Path):
    """The file of an adapter has the numbers of the file of the merged model, in every type."""
    adapter = find_trained(str(adapter_of(save_model(name, tmp_path / "model"), tmp_path / "adapter", **options)))
    merged = find_trained(str(merge(adapter, tmp_path / "merged", verify=False).folder))
    before = tensors(export_model(find_trained(str(tmp_path / "model")), tmp_path / "0" / "x.gguf", quant="f32").file)
    for quant in ("f32", "q8_0"):
        ours = tensors(export_model(adapter, tmp_path / quant / "adapter.gguf", quant=quant).file)
        theirs = tensors(export_model(merged, tmp_path / quant / "merged" / "merged.gguf", quant=quant).file)
        assert ours.keys() == theirs.keys()
        for part in ours:
            np.testing.assert_array_equal(ours[part], theirs[part], err_msg=part)
        if quant == "f32":
            changed = [part for part in before if not np.array_equal(before[part], ours[part])]
            assert changed or "output.weight" in ours.keys() - before.keys()


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}], ids=str)
def test_an_adapters_factors_are_what_peft_adds(name: str, options: dict[str, Any], tmp_path: Path):
    """alpha / rank times B times A is the difference between a merged tensor and the base's, in the file's order."""
    fused = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]} if "moe" in name else {}
    model = save_model(name, tmp_path / "model")
    trained = find_trained(str(adapter_of(model, tmp_path / "adapter", **fused, **options)))
    added = export_adapter(trained, tmp_path / "a" / "adapter.gguf").file
    base = tensors(export_model(find_trained(str(model)), tmp_path / "b" / "base.gguf", quant="f32").file)
    merged = tensors(export_model(trained, tmp_path / "c" / "merged.gguf", quant="f32").file)
    fields = gguf.GGUFReader(added).fields
    alpha = fields["adapter.lora.alpha"].contents()
    factors = tensors(added)
    assert (fields["general.type"].contents(), fields["adapter.type"].contents()) == ("adapter", "lora")
    assert {part.rpartition(".lora_")[0] for part in factors} == {
        part for part in base if not np.array_equal(base[part], merged[part])
    }
    for part in factors:
        if part.endswith(".lora_a"):
            a, b = factors[part], factors[part.removesuffix("a") + "b"]
            weight = part.removesuffix(".lora_a")
            np.testing.assert_allclose(b @ a * (alpha / b.shape[-1]), merged[weight] - base[weight], atol=1e-5)


REFUSED_ADAPTERS = {
    "Dora is more than LoRA": {"use_dora": True},
    "was trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "LoRA on embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "lora_alpha is 0": {"lora_alpha": 0},
}


@pytest.mark.parametrize(("message", "options"), REFUSED_ADAPTERS.items(), ids=REFUSED_ADAPTERS)
def test_an_adapter_that_llama_cpp_cannot_add(message: str, options: dict[str, Any], tmp_path: Path):
    """It is refused by name, and nothing is written."""
    adapter = adapter_of(save_model("llama", tmp_path / "model"), tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=message):
        export_adapter(find_trained(str(adapter)), tmp_path / "out" / "adapter.gguf")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_tied_takes_no_adapter(tmp_path: Path):
    """A GGUF file of the base has no head of its own."""
    model = save_model("llama, tied", tmp_path / "model")
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(UserError, match="no head of its own"):
        export_adapter(find_trained(str(adapter)), tmp_path / "out" / "adapter.gguf")


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden_act is 'relu'": ("llama", {"hidden_act": "relu"}),
    "rope_type 'dynamic'": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "rope_type 'llama3'": ("qwen2", {"rope_parameters": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 16}}),
    "use_sliding_window": ("qwen2", {"use_sliding_window": True}),
    "query_pre_attn_scalar": ("gemma2", {"query_pre_attn_scalar": 24}),
    "layer_types": ("gemma2", {"layer_types": ["full_attention", "full_attention"]}),
    "norm_topk_prob": ("qwen3_moe", {"norm_topk_prob": False}),
    "have no experts": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "attention_factor of YaRN": ("llama", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 32}}),
    "a head of its own": ("gemma", {"tie_word_embeddings": False}),
}  # fmt: skip


@pytest.mark.parametrize(("message", "case"), CHANGES.items(), ids=CHANGES)
def test_settings_that_llama_cpp_would_not_compute(message: str, case: tuple[str, dict[str, Any]], tmp_path: Path):
    """A setting that the family in llama.cpp does not have is refused by name, and nothing is written."""
    name, changes = case
    folder = save_model(name, tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_unknown_family_is_refused(tmp_path: Path):
    """The message names the families that can be written."""
    folder = save_model("llama", tmp_path / "model")
    config = MambaConfig(vocab_size=949, hidden_size=32, state_size=4, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    result = run_command("export", folder, "--gguf", "--output", tmp_path / "out" / "model.gguf")
    assert result.status == 2
    assert "model_type 'mamba'" in result.err
    assert "llama, mistral" in result.err
    assert not (tmp_path / "out").exists()


def test_numbers_that_the_type_cannot_hold(tmp_path: Path):
    """A weight beyond float16's range is an error in f16, with advice, and is written in bf16."""
    folder = save_model("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight: holds 100000, which F16 cannot; try --quant bf16"):
        export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf", quant="f16")
    assert not (tmp_path / "out").exists()
    export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf", quant="bf16")


def test_a_sliding_window_that_llama_cpp_ignores_shortens_the_context(tmp_path: Path):
    """Texts up to the window are the same in both; the file's context is no longer, and a note says so."""
    folder = save_model("mistral", tmp_path / "model", sliding_window=48)
    written = export_model(find_trained(str(folder)), tmp_path / "out" / "model.gguf")
    assert gguf.GGUFReader(written.file).fields["llama.context_length"].contents() == 48
    assert any("context length 48, not 128" in note for note in written.notes)


WRONG = {
    "name a format: --gguf": [],
    "--quant q9: take one of f32, f16, bf16, q8_0, q4_0": ["--gguf", "--quant", "q9"],
    "an adapter is written in f32, and not merged": ["--gguf", "--adapter", "--quant", "f16"],
    "not an adapter. Export it without --adapter": ["--gguf", "--adapter"],
    "--dequantized: the run's config does not say": ["--gguf", "--dequantized"],
}


@pytest.mark.parametrize(("message", "options"), WRONG.items(), ids=WRONG)
def test_options_that_cannot_be(message: str, options: list[str], tmp_path: Path, elsewhere: Path):
    """A wrong option is one message with status 2, and nothing is written."""
    result = run_command("export", save_model("llama", tmp_path / "model"), *options)
    assert (result.status, message in result.err) == (2, True), result.err
    assert [path.name for path in elsewhere.iterdir()] == ["model"]


# --- Files -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If the disk is full in the middle, there is one message, and no file and no folder that was not there."""
    folder = save_model("llama", tmp_path / "model")
    written = 0

    def full(name: str, tensor: Any, how: Any) -> Any:
        nonlocal written
        written += 1
        if written == 9:
            raise OSError(28, "No space left on device")
        return real(name, tensor, how)

    real = gguf_file.quantised
    monkeypatch.setattr(gguf_file, "quantised", full)
    for output in (tmp_path / "new" / "folder" / "x.gguf", tmp_path / "x.gguf"):
        written = 0
        with pytest.raises(atomic.WriteError, match="cannot be written: No space left"):
            export_model(find_trained(str(folder)), output)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_too_small_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is written if the free space is less than the file."""
    folder = save_model("llama", tmp_path / "model")
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"are to be written, and 0\.00 GB are free"):
        export_model(find_trained(str(folder)), tmp_path / "out" / "x.gguf")
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(tmp_path: Path):
    """A file of that name, and files beside it that no export wrote, are errors; those of an export are replaced."""
    trained = find_trained(str(save_model("llama", tmp_path / "model")))
    out = tmp_path / "out"
    export_model(trained, out / "a.gguf", quant="q8_0")
    with pytest.raises(UserError, match="is there already"):
        export_model(trained, out / "a.gguf")
    export_model(trained, out / "b.gguf", quant="q4_0")
    assert "FROM ./b.gguf" in (out / "Modelfile").read_text()
    (out / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README\.md: is there already, and no export wrote it"):
        export_model(trained, out / "c.gguf")
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "README.md", "a.gguf", "b.gguf"]


def test_card_and_licence_travel(tmp_path: Path):
    """The base's licence lies beside the file and in the Modelfile, and its identifier is in card and settings."""
    folder = save_model("llama", tmp_path / "model")
    (folder / "LICENSE").write_text("Do what you like.\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# The model\n\nIt answers.\n")
    trained = find_trained(str(adapter_of(folder, tmp_path / "adapter")))
    file = export_model(trained, tmp_path / "out" / "x.gguf").file
    card = (file.parent / "README.md").read_text()
    assert (file.parent / "LICENSE").read_text() == "Do what you like.\n"
    assert 'LICENSE """Do what you like."""' in (file.parent / "Modelfile").read_text()
    assert "license: mit" in card
    assert "library_name: gguf" in card
    assert "`x.gguf` holds the model in q8_0" in card
    assert gguf.GGUFReader(file).fields["general.license"].contents() == "mit"


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path):
    """Reading the tensors of a file takes the memory of a few of them, not that of the model."""
    folder = save_model("llama", tmp_path / "model", num_hidden_layers=12, intermediate_size=512)
    trained = find_trained(str(adapter_of(folder, tmp_path / "adapter")))
    weights = (folder / "model.safetensors").stat().st_size
    plan = plan_model(trained, "q8_0", None)
    with PeakStorage() as memory:
        count = sum(1 for _ in plan.values())
    assert count == len(plan.tensors)
    assert memory.peak < weights / 4


def test_the_default_file_is_named_after_the_run(finished_run: Path):
    """A run's export lies in a folder of its own, wherever in the run the weights are."""
    for folder in (finished_run, finished_run / "final", finished_run / "checkpoints" / "step-4"):
        assert default_output(find_trained(str(folder)), "q4_0") == Path("out-gguf/out-q4_0.gguf")


def test_an_adapter_of_another_shape(tmp_path: Path):
    """It is refused with merge's message, before anything is written."""
    small = save_model("llama", tmp_path / "small")
    adapter = adapter_of(small, tmp_path / "adapter")
    other = save_model("llama", tmp_path / "other", hidden_size=128)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(other)}))
    for write in (export_model, export_adapter):
        with pytest.raises(UserError, match="another size"):
            write(find_trained(str(adapter)), tmp_path / "out" / "x.gguf")
    assert not (tmp_path / "out").exists()


def test_the_adapter_is_read_by_peft_as_it_is_exported(tmp_path: Path):
    """The adapter of the tests has an effect."""
    model = save_model("llama", tmp_path / "model")
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(5, 25)[None]
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, adapter_of(model, tmp_path / "adapter"))(ids).logits
    assert (after - before).norm() > 0.1 * before.norm()
