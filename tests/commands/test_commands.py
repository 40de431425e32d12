"""Every command of the README on a run of every loss, with and without adapters, through the real command line.

The tests are the product of runs and commands: a run is a row of RUNS, a command is a row of COMMANDS, and a new row
of either meets all rows of the other. Once `fastpref eval` failed for SimPO, ORPO and CPO runs, and no test noticed:
each command and each loss was tested, but not each command with each loss.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MambaConfig, Qwen3MoeConfig

from fastpref.cli import app
from fastpref.config.losses import title_of
from tests.support.adapters import save_adapter
from tests.support.command_line import CommandResult, run_command, succeed
from tests.support.paths import QUICKSTART_HELDOUT, QUICKSTART_MODEL, QUICKSTART_ROWS
from tests.support.readme import OURS
from tests.support.runs import last_evaluation, rows

SIZES: dict[str, Any] = {"vocab_size": 949, "hidden_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": LlamaConfig(
        **SIZES, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2,
    ),
    "mamba": MambaConfig(**SIZES, state_size=4, num_hidden_layers=2, initializer_range=0.2),
    "moe": Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, norm_topk_prob=True,
    ),
}  # fmt: skip
CONFIG = """
[model]
name = "{model}"
[loss]
type = "{loss}"
[[data]]
path = "rows.jsonl"
rows = 13
[[eval.data]]
path = "heldout.jsonl"
[eval]
every = 2
sample_tokens = 2
[train]
learning_rate = 1e-2
steps = 4
batch = 5
tokens_per_microbatch = 150
[output]
dir = "run"
save_every = 2
"""
LORA = "lora={rank=4}"
ADD = "tokens.add=['<think>', 'ine plus']"
EXPERTS = 'lora={rank=4, target=["q_proj", "experts"]}'
FROM = "lora.from={adapter}"  # a trained adapter of the model
LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo", "cpo", "sft")
HELDOUT = 5  # rows; twice as many for KTO
Make = Callable[[int, dict[str, Any]], dict[str, Any]]  # a row's number, and a pair → a row of the data


def weighted(at: int, pair: dict[str, Any]) -> dict[str, Any]:
    return pair | {"weight": 1 + at % 3}


def with_margin(at: int, pair: dict[str, Any]) -> dict[str, Any]:
    return weighted(at, pair) | {"margin": 0.5 * (at % 2)}


def listed(at: int, pair: dict[str, Any]) -> dict[str, Any]:
    third = [[{"role": "assistant", "content": f"Nine, {at}."}]] if at % 2 else []
    answers = [pair["rejected"], pair["chosen"], *third]
    return {"prompt": pair["prompt"], "responses": answers, "scores": [0, 2, 1][: len(answers)], "weight": 1 + at % 2}


def talked(at: int, pair: dict[str, Any]) -> dict[str, Any]:
    more = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": f"Nine, {at}."}] * (at % 2)
    return {"messages": [*pair["prompt"], *pair["chosen"], *more], "weight": 1 + at % 2}


ROWS: dict[str, Make] = {
    "sft, nf4, messages": talked,
    "sft, LoRA, padded, lists": listed,
    "dpo, LoRA, margins": with_margin, "kto, LoRA, weights": weighted, "pl, nf4, lists": listed,
}  # fmt: skip
RUNS: dict[str, tuple[str, str, list[str]]] = {
    **{f"{loss}, LoRA": (loss, "llama", [LORA]) for loss in LOSSES},
    **{f"{loss}, full": (loss, "llama", []) for loss in LOSSES},
    "pl, LoRA": ("pl", "llama", [LORA]),
    "lipo, full": ("lipo", "llama", []),
    "simpo, LoRA, padded": ("simpo", "mamba", ['lora={rank=4, target=["in_proj"]}']),
    "kto, full, padded": ("kto", "mamba", []),
    "orpo, LoRA, packed": ("orpo", "llama", [LORA, "train.layout=packed"]),
    "dpo, nf4": ("dpo", "llama", [LORA, "model.quantization=nf4"]),
    "lipo, LoRA, padded": ("lipo", "mamba", ['lora={rank=4, target=["in_proj"]}']),
    "dpo, LoRA, margins": ("dpo", "llama", [LORA]),
    "kto, LoRA, weights": ("kto", "llama", [LORA]),
    "pl, nf4, lists": ("pl", "llama", [LORA, "model.quantization=nf4"]),
    "dpo, experts": ("dpo", "moe", [EXPERTS]),
    **{f"{loss}, experts in nf4": (loss, "moe", [EXPERTS, "model.quantization=nf4"]) for loss in ("dpo", "kto", "sft")},
    "ipo, experts in nf4, streamed": ("ipo", "moe", [EXPERTS, "model.quantization=nf4", "model.streaming=true"]),
    "dpo, continued": ("dpo", "llama", [FROM]),
    "ipo, continued, base": ("ipo", "llama", [FROM, "reference.adapter=none"]),
    "kto, continued, nf4": ("kto", "llama", [FROM, "model.quantization=nf4"]),
    "orpo, continued": ("orpo", "llama", [FROM]),
    "dpo, stacked": ("dpo", "llama", [LORA, FROM, "lora.stack=true"]),
    "dpo, another reference": ("dpo", "llama", [LORA, "reference.name={adapter}"]),
    "dpo, continued, nf4, streamed": ("dpo", "llama", [FROM, "model.quantization=nf4", "model.streaming=true"]),
    "dpo, experts in nf4, continued": ("dpo", "moe", [FROM, "model.quantization=nf4"]),
    "dpo, experts, stacked": ("dpo", "moe", [EXPERTS, FROM, "lora.stack=true"]),
    **{f"{loss}, LoRA, new tokens": (loss, "llama", [LORA, ADD]) for loss in ("dpo", "kto")},
    "sft, nf4, new tokens": ("sft", "llama", [LORA, ADD, "model.quantization=nf4"]),
    "ipo, full, new tokens": ("ipo", "llama", [ADD]),
    "dpo, full, noise": ("dpo", "llama", ["train.neftune_alpha=5"]),
    "dpo, nf4, PiSSA in a layer": (
        "dpo",
        "llama",
        ['lora={rank=4, init="pissa", layers=[1], rank_pattern={q_proj=2}}', "model.quantization=nf4"],
    ),
    "sft, nf4, messages": ("sft", "llama", [LORA, "model.quantization=nf4"]),
    "sft, LoRA, padded, lists": ("sft", "mamba", ['lora={rank=4, target=["in_proj"]}']),
    "sft, nf4, streamed": ("sft", "llama", [LORA, "model.quantization=nf4", "model.streaming=true"]),
    "sft, continued": ("sft", "llama", [FROM]),
    "dpo, nf4, streamed": ("dpo", "llama", [LORA, "model.quantization=nf4", "model.streaming=true"]),
}


@dataclass(frozen=True)
class Run:
    """A finished run, in a folder with its config cfg.toml, run/, model/ and heldout.jsonl."""

    loss: str
    model: str
    overrides: list[str]
    folder: Path
    trained: CommandResult

    @property
    def path(self) -> Path:
        return self.folder / "run"

    @property
    def moe(self) -> bool:
        return self.model.endswith("moe")

    @property
    def adapters(self) -> bool:
        return any(override.startswith("lora") for override in self.overrides)

    @property
    def stacked(self) -> bool:
        return "lora.stack=true" in self.overrides

    @property
    def start(self) -> str | None:
        """The adapter that the training began with."""
        return next((o.partition("=")[2] for o in self.overrides if o.startswith("lora.from=")), None)

    @property
    def original(self) -> str:
        """The model or adapter that the training began with."""
        return self.start or self.model

    @property
    def reference(self) -> str:
        """The model or adapter that the training compared with."""
        named = next((o.partition("=")[2] for o in self.overrides if o.startswith("reference.name=")), None)
        return named or (self.model if "reference.adapter=none" in self.overrides else self.original)

    @property
    def own(self) -> dict[str, float]:
        return last_evaluation(self.path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a random model of each kind with the quickstart's tokenizer, and return the folders."""
    folders = {}
    for name, config in MODELS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("models") / name
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(QUICKSTART_MODEL).save_pretrained(folders[name])
    save_adapter(folders["llama"].with_name("adapter"), folders["llama"], r=3)
    experts: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    save_adapter(folders["moe"].with_name("adapter"), folders["moe"], r=3, **experts)
    return folders


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train one run for all commands, which must not change it."""
    loss, model, overrides = RUNS[request.param]
    adapter = models[model].with_name("adapter").as_posix()
    overrides = [override.replace("{adapter}", adapter) for override in overrides]
    folder = tmp_path_factory.mktemp("run")
    make = ROWS.get(request.param, lambda at, pair: pair)
    for path, count in ((QUICKSTART_HELDOUT, HELDOUT), (QUICKSTART_ROWS, None)):
        pairs = map(json.loads, path.read_text(encoding="utf-8").splitlines()[:count])
        lines = [json.dumps(make(at, pair)) for at, pair in enumerate(pairs)]
        (folder / ("heldout.jsonl" if count else "rows.jsonl")).write_text("\n".join(lines))
    (folder / "cfg.toml").write_text(CONFIG.format(model=models[model].as_posix(), loss=loss))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trained = succeed("train", "cfg.toml", *overrides)
    return Run(loss, models[model].as_posix(), overrides, folder, trained)


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the hub by one that accepts everything, and return its uploads."""
    uploads: list[dict[str, Any]] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "whoami", lambda _: {})
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: "https://hub/me/mine")
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: uploads.append(options))
    return uploads


# --- What each command gives for a run --------------------------------------------------------------------------------


def train(run: Run, _: Path) -> None:
    """Check that the result is saved, each step has finite metrics, and the layout is the one for the model."""
    assert "saved: run/final" in run.trained.out
    steps = [row for row in rows(run.path) if "loss" in row]
    assert steps
    assert all(abs(row["loss"]) < 1e4 and row["grad_norm"] > 0 for row in steps)
    assert ("streaming: 2 of 2 layers" in run.trained.out) == ("streaming" in str(run.overrides))
    layout = "padded, because" if "mamba" in run.model else "packed" if "packed" in str(run.overrides) else "tree"
    assert f"layout {layout}" in run.trained.out


def resume(run: Run, folder: Path) -> None:
    """Check that a run resumed from its middle has exactly the same metrics."""
    cut = shutil.copytree(run.path, folder / "run")
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints" / "step-4")
    resume = ["--resume", cut / "checkpoints" / "step-2", f"output.dir={cut}"]
    assert "resumed after step 2 of 4" in succeed("train", run.folder / "cfg.toml", *resume, *run.overrides).out
    assert rows(cut) == rows(run.path)


def check(run: Run, _: Path) -> None:
    """Check that the output names the loss and what is trained."""
    out = succeed("check", run.folder / "cfg.toml", *run.overrides).out
    assert f"no mistakes. {title_of(run.loss)} on " in out
    adapters = f"the LoRA adapter {run.start}" if run.start and not run.stacked else "LoRA adapters of rank 4"
    assert (adapters if run.adapters else "the whole model") in out


def preview(run: Run, _: Path) -> None:
    """Check that rows have the loss's names for completions, and that the data are counted."""
    out = succeed("preview", run.folder / "cfg.toml", *run.overrides).out
    names = ("completion 0", "score") if "responses and scores" in out else ("chosen", "rejected")
    names = {"kto": ("good", "bad"), "sft": ("completion",)}.get(run.loss, names)
    assert all(word in out for word in names)
    trained = 2 * 13 if run.loss == "kto" else 13
    assert re.search(rf"used +{trained} +{heldout(run)}\b", out)


def estimate(run: Run, _: Path) -> None:
    """Check that weights and adapters count as in the files, gradients as no more, and nf4 weights as half a byte."""
    result = succeed("estimate", run.folder / "cfg.toml", "--cpu", "--json", *run.overrides).json
    assert (result["loss"], result["device"]) == (run.loss, "cpu")
    model = Path(run.model) / "model.safetensors"
    # Two rows of two tables; PEFT keeps what trained ones were.
    added = 2 * 2 * 4 * SIZES["hidden_size"] * (2 if run.adapters else 1) * (ADD in run.overrides)
    weights, adapters = size(model) + added, size(run.path / "final" / "adapter_model.safetensors")
    if "nf4" in str(run.overrides):
        embeddings, tables = 2 * 4 * SIZES["vocab_size"] * SIZES["hidden_size"], 2 * 7 * 4 * (16 + 256)  # of 14 layers
        quantised = 0.52 / 4 * (weights - embeddings) + tables
        padding = 14 * 5 * 256  # bytes, at most, between the tensors of a buffer
        if streamed := "model.streaming=true" in run.overrides:  # both layers in slots, everything in host memory too
            assert embeddings + quantised == pytest.approx(result["step"]["host"], abs=padding)
        weights = result["step"]["bytes"]["weights"] + (embeddings if streamed else 0)
        assert weights == pytest.approx(embeddings + quantised, rel=0.01, abs=padding * streamed)
    else:
        assert result["step"]["bytes"]["weights"] == pytest.approx(weights, rel=1e-3)
    own = size(run.path / "final" / "on_top" / "adapter_model.safetensors") or adapters
    other = size(Path(run.original) / "adapter_model.safetensors")
    assert result["step"]["bytes"]["adapters"] == (own + other if run.stacked else adapters)
    trained = own / 2 if "pissa" in str(run.overrides) else own  # the other half stays as it began
    # At a peak in the forward pass of a step's first micro-batch there are no gradients yet.
    assert 0 <= result["step"]["bytes"]["gradients"] <= (trained or weights)
    # An adapter as reference adds its own size; a stack has it in any case, and the base model takes nothing.
    second = run.loss not in ("orpo", "sft") and not run.stacked and run.reference != run.model
    assert result["step"]["bytes"]["reference"] == second * size(Path(run.reference) / "adapter_model.safetensors")


def estimate_card(run: Run, _: Path) -> None:
    """Check that this small model fits every GPU, none of which has to exist, and could have longer rows there."""
    largest = ["--largest"] if run.overrides == [LORA] else []  # several counts, so for one run of each loss
    result = succeed("estimate", run.folder / "cfg.toml", "--card", "12", *largest, "--json", *run.overrides).json
    assert ("largest" in result) == bool(largest)
    assert all(gpu["fits"] for gpu in result["cards"])
    assert (result["device"], result["card"]) == ("cuda", 12)


def evaluate(run: Run, _: Path) -> None:
    """Check that eval gives the run's own last evaluation and the KL, and a table for a person."""
    same_as_own(run, metrics_of(run.path))
    result = succeed("eval", run.path)
    assert ("streaming: 2 of 2 layers" in result.err) == ("streaming" in str(run.overrides))
    out = result.out
    assert f"{heldout(run)} held-out examples" in out
    if "rewards/accuracies" in run.own:
        assert f"{run.own['rewards/accuracies']:.1%}" in out
        assert "95 % interval" in out
    assert "KL to the reference" in out


def evaluate_reference(run: Run, _: Path) -> None:
    """Check that naming the run's reference changes nothing, and that a run against itself has no KL."""
    named = metrics_of(run.path, "--reference", run.reference)
    if "nf4" not in str(run.overrides):  # whose original is the quantised model
        same_as_own(run, named)
    itself = metrics_of(run.path, "--reference", run.path)
    assert itself["reference/kl"] == pytest.approx(0, abs=1e-6)
    for name in run.own.keys() & {"logps/chosen", "logps/rejected", "entropy"}:  # do not depend on the reference
        assert itself[name] == pytest.approx(run.own[name], rel=1e-4)


def chat(run: Run, _: Path) -> None:
    """Check that with --compare both models give the answers that each gives alone."""
    options = ["--temperature", "0", "--max-tokens", "4"]
    question = "What is four plus five?\n"
    answered = succeed("chat", run.path, *options, given=question)
    assert ("streaming: 2 of 2 layers" in answered.err) == ("streaming" in str(run.overrides))
    after = answered.out
    both = succeed("chat", run.path, "--compare", *options, given=question).out
    assert both.startswith("before: ")
    before, trained = both.removeprefix("before: ").split("trained: ")
    assert trained.strip() == after.strip()
    if "nf4" not in str(run.overrides):
        assert before.strip() == succeed("chat", run.original, *options, given=question).out.strip()


def report(run: Run, folder: Path) -> None:
    """Check that the page of the run is written again."""
    page = shutil.copytree(run.path, folder / "run") / "report.html"
    page.unlink()
    succeed("report", folder / "run")
    assert title_of(run.loss) in page.read_text(encoding="utf-8")


def compare(run: Run, folder: Path) -> None:
    """Check that the run is compared with itself, as with another: its loss and its model are named, and no fault."""
    places = [shutil.copytree(run.path, folder / name) for name in ("a", "b")]
    result = succeed("report", *places, "--output", folder / "page.html")
    assert result.out.count(run.loss) >= 2
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert all(words in page for words in (title_of(run.loss), "finished", 'id="heldout"', 'id="answers"'))
    assert "differences" not in page


def list_runs(run: Run, _: Path) -> None:
    """Check that the run is listed with its last held-out loss."""
    (listed,) = succeed("runs", run.folder, "--json").json
    assert (listed["loss"], listed["state"], listed["step"]) == (run.loss, "finished", 4)
    assert listed["eval/loss"] == run.own["loss"]


def merge(run: Run, folder: Path) -> None:
    """Check that the merged model has the run's metrics, or that a run without adapters is refused."""
    if not run.adapters:
        result = run_command("merge", run.path, "--output", folder / "merged")
        assert (result.status, "nothing to merge" in result.err) == (2, True)
        assert not (folder / "merged").exists()
        return
    succeed("merge", run.path, "--output", folder / "merged")
    # A model alone has no run, so options give the loss, and the batch in which KTO pairs prompts with completions.
    known = [f"loss.type={run.loss}", "train.batch=5", *(o for o in run.overrides if o == ADD)]
    merged = metrics_of(folder / "merged", "--data", run.folder / "heldout.jsonl", "--reference", run.reference, *known)
    if "nf4" in str(run.overrides):  # merged onto the 4-bit weights; this reference has the original ones
        name = "nll_loss" if run.loss == "sft" else "logps/chosen"
        assert merged[name] == pytest.approx(run.own[name], rel=1e-3)
    else:
        same_as_own(run, merged, rel=1e-3)


def export(run: Run, folder: Path) -> None:
    """Check that transformers reads the run's result from the file, or that a family without GGUF is refused."""
    given = ["export", run.path, "--gguf", "--quant", "f32", "--output", folder / "out" / "x.gguf"]
    if "mamba" in run.model:
        result = run_command(*given)
        assert (result.status, "model_type 'mamba'" in result.err) == (2, True)
        assert not (folder / "out").exists()
        return
    assert f"tensors: {27 if run.moe else 21} in f32" in succeed(*given).out
    result = run.path / "final"
    if run.adapters:
        result = folder / "merged"
        succeed("merge", run.path, "--output", result, "--dtype", "float32", "--no-verify")
    ids = torch.arange(3, 40)[None]
    whole: Any = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32)
    config = {"config": whole.config} if run.moe else {}  # transformers does not read all settings of experts
    read: Any = AutoModelForCausalLM.from_pretrained(folder / "out", gguf_file="x.gguf", dtype=torch.float32, **config)
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, whole(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in (folder / "out" / "Modelfile").read_text()
    assert title_of(run.loss) in (folder / "out" / "README.md").read_text()


def export_adapter(run: Run, folder: Path) -> None:
    """Check that an adapter is written alone, with two tensors for each of PEFT's two, or that there is none."""
    result = run_command("export", run.path, "--gguf", "--adapter", "--output", folder / "out" / "x.gguf")
    adapters = run.adapters and "mamba" not in run.model and ADD not in run.overrides
    refused = not (folder / "out").exists()
    assert (result.status, refused) == ((0, False) if adapters else (2, True))
    if adapters:
        with safe_open(run.path / "final" / "adapter_model.safetensors", "pt") as file:
            count = len(file.keys()) + 4 * run.moe  # in each of two layers, gate and up have a tensor each, A and B
            assert f"tensors: {count} in f32" in result.out


def push(run: Run, _: Path, hub: list[dict[str, Any]]) -> None:
    """Check that the run's result is uploaded."""
    out = succeed("push", run.path, "--to", "me/mine").out
    assert "is at https://hub/me/mine" in out
    assert [Path(upload["folder_path"]) for upload in hub] == [run.path / "final"]


def metrics_of(*arguments: str | Path) -> dict[str, Any]:
    return succeed("eval", *arguments, "--json").json


def same_as_own(run: Run, metrics: dict[str, Any], rel: float = 1e-4) -> None:
    """Check that the metrics are those of the run's last evaluation, with the KL in addition."""
    assert metrics["examples"] == heldout(run)
    assert run.own.keys() <= metrics.keys()
    for name, value in run.own.items():
        assert metrics[name] == pytest.approx(value, rel=rel, abs=1e-4), name
    assert {
        "perplexity" if run.loss == "sft" else "rewards/margins",
        "loss",
        "entropy",
        "reference/kl",
    } <= metrics.keys()
    assert ("rewards/margins" in metrics) == (run.loss != "sft")
    assert ("logps/accuracies" in metrics) == (run.loss not in ("kto", "sft"))
    assert ("kl" in metrics) == (run.loss == "kto")
    assert metrics.get("kl", 0) >= 0
    assert metrics["reference/kl"] > 1e-6  # the policy differs from its reference


def heldout(run: Run) -> int:
    return 2 * HELDOUT if run.loss == "kto" else HELDOUT


def size(path: Path) -> int:
    """Return the bytes of a file's tensors, 0 if the file does not exist."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "train --resume": resume,
    "check": check,
    "preview": preview,
    "estimate --cpu --json": estimate,
    "estimate --card --largest --json": estimate_card,
    "eval --json": evaluate,
    "eval --data --json": lambda run, _: same_as_own(run, metrics_of(run.path, "--data", run.folder / "heldout.jsonl")),
    "eval --reference --json": evaluate_reference,
    "eval checkpoint": lambda run, _: same_as_own(run, metrics_of(run.path / "checkpoints" / "step-4")),
    "chat --compare": chat,
    "report": report,
    "report --output": compare,
    "runs --json": list_runs,
    "merge --output": merge,
    "export --gguf --quant --output": export,
    "export --gguf --adapter --output": export_adapter,
    "push --to": push,
}
_OF_NO_RUN = {"init", "schema"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Change to an empty folder, on which no command depends and in which none leaves a file."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    yield
    assert not list(place.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_run(name: str, run: Run, tmp_path: Path, hub: list[dict[str, Any]]):
    """A command on a run ends with status 0 and gives the right result."""
    more = [hub] if name.startswith("push") else []
    COMMANDS[name](run, tmp_path, *more)


def test_no_command_is_left_out():
    """Every command, and every option that the README shows for one on a run, is a row of COMMANDS."""
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert {name.split()[0] for name in COMMANDS} | _OF_NO_RUN == commands
    for line in OURS:
        _, command, *words = shlex.split(line)
        if command in _OF_NO_RUN:
            continue
        options = {word for word in words if word.startswith("--")} - {"--open", "--public", "--compare"}
        rows_of_it = [set(name.split()) for name in COMMANDS if name.split()[0] == command]
        assert any(options <= row for row in rows_of_it), line
