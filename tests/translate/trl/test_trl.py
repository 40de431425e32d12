"""Translation of the configs of TRL's command line: single fields, whole configs, and what is left out."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpref.config import Config, load_config
from fastpref.config.losses import LOSSES
from fastpref.errors import UserError
from fastpref.translate import translate
from fastpref.translate.trl import rows
from tests.support.command_line import run_command, succeed
from tests.support.trainer_fields import TRL_OWN
from tests.support.translations import TRAINERS, expected, flat, snippet, tables, wanted

TRL = TRAINERS["TRL"]
SMALLEST = flat(
    {  # the translation of the smallest config: TRL's defaults
        "model": {"name": "m"},
        "loss": {"type": "dpo"},
        "data": [{"path": "d"}],
        "tokens": {"max_length": 1024, "score": "all"},
        "train": {
            "learning_rate": 1e-6, "schedule": "linear", "warmup": 0, "epochs": 3.0, "batch": 8,
            "tokens_per_microbatch": 8 * 2 * 1024,
        },
        "output": {"save_every": 500},
        "log": {"every": 10},
    }
)  # fmt: skip
LORA = {"lora": {"target": ["q_proj", "v_proj"]}}
# TRL's fields → what they add to or change in the smallest config.
TABLE: dict[str, dict[str, Any]] = {
    "{}": {},
    "model_revision: v1": {"model.revision": "v1"},
    "trust_remote_code: true": {"model.trust_remote_code": True},
    "dtype: auto": {},
    "dtype: bfloat16": {"model.dtype": "bfloat16"},
    "{bf16: false}": {"model.dtype": "float32"},
    "{bf16: true}": {},
    "{bf16: true, use_peft: true}": {"model.dtype": "bfloat16", **LORA},
    "{fp16: true}": {},
    "{fp16: true, use_peft: true}": {"model.dtype": "float16", **LORA},
    "use_peft: true": LORA,
    "{use_peft: true, lora_r: 8, lora_alpha: 8, use_rslora: true, use_dora: true, lora_modules_to_save: [embed]}": {
        "lora": {"rank": 8, "alpha": 8, "rslora": True, "dora": True, "modules_to_save": ["embed"],
                 "target": ["q_proj", "v_proj"]},
    },
    "{use_peft: true, lora_target_modules: [all-linear]}": {"lora": {"target": "all-linear"}},
    "{use_peft: true, lora_target_modules: all-linear}": {"lora": {"target": "all-linear"}},
    "{use_peft: true, lora_target_modules: [up_proj]}": {"lora": {"target": ["up_proj"]}},
    "{use_peft: true, lora_target_modules: ['.*_proj']}": {"lora": {"target": ".*_proj"}},
    "{use_peft: true, lora_target_modules: [q_proj, up_proj]}": {"lora": {"target": ["q_proj", "up_proj"]}},
    "{use_peft: true, disable_dropout: false}": {"lora": {"target": ["q_proj", "v_proj"], "dropout": 0.05}},
    "{use_peft: true, disable_dropout: false, lora_dropout: 0.2}": {
        "lora": {"target": ["q_proj", "v_proj"], "dropout": 0.2},
    },
    "{use_peft: true, load_in_4bit: true}": {"model.quantization": "nf4", **LORA},
    "{use_peft: true, load_in_8bit: true}": {"model.quantization": "int8", **LORA},
    "beta: 0.3": {"loss.beta": 0.3},
    "loss_type: hinge": {"loss.variants": ["hinge"]},
    "loss_type: [ipo]": {"loss.variants": ["ipo"]},
    "{loss_type: [sigmoid, bco_pair, sft], loss_weights: [0.8, 0.2, 1.0]}": {
        "loss": {"type": "dpo", "variants": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1.0]},
    },
    "{loss_type: exo_pair, label_smoothing: 0.001}": {
        "loss": {"type": "dpo", "variants": ["exo_pair"], "label_smoothing": 0.001},
    },
    "ld_alpha: 0.5": {"loss.length_alpha": 0.5},
    "f_divergence_type: js_divergence": {"loss.f_divergence": "js"},
    "{f_divergence_type: alpha_divergence, f_alpha_divergence_coef: 0.3}": {
        "loss": {"type": "dpo", "f_divergence": "alpha", "f_alpha": 0.3},
    },
    "use_weighting: true": {"loss.weighting": True},
    "{loss_type: discopop, discopop_tau: 0.1}": {
        "loss": {"type": "dpo", "variants": ["discopop"], "discopop_tau": 0.1},
    },
    "loss_type: kto": {"loss.type": "kto"},
    "loss_type: apo_zero_unpaired": {"loss": {"type": "kto", "kl": "none"}},
    "{desirable_weight: 0.2, undesirable_weight: 0}": {
        "loss": {"type": "kto", "desirable_weight": 0.2, "undesirable_weight": 0},
    },
    "precompute_ref_log_probs: true": {"reference.mode": "precompute"},
    "{dataset_config: c, dataset_train_split: s}": {"data": [{"path": "d", "name": "c", "split": "s"}]},
    "datasets: [{path: a, name: n, split: s}, {path: b}]": {
        "data": [{"path": "a", "name": "n", "split": "s"}, {"path": "b"}],
    },
    "datasets: [{path: json, data_files: [a.jsonl, b.jsonl], split: train}]": {
        "data": [{"path": "a.jsonl"}, {"path": "b.jsonl"}],
    },
    "datasets: [{path: json, data_files: {train: a.jsonl, test: b.jsonl}}]": {"data": [{"path": "a.jsonl"}]},
    "{datasets: [{path: a}], test_split_size: 0.1}": {"data.0.path": "a", "eval.fraction": 0.1},
    "{eval_strategy: steps, eval_steps: 20}": {
        "eval.every": 20, "eval.data": [{"path": "d", "split": "test"}],
    },
    "{eval_strategy: steps, logging_steps: 5}": {
        "eval": {"every": 5, "data": [{"path": "d", "split": "test"}]}, "log.every": 5,
    },
    "{eval_strategy: steps}": {"eval": {"every": 10, "data": [{"path": "d", "split": "test"}]}},
    "{eval_strategy: steps, eval_steps: 0.25, max_steps: 10, dataset_test_split: s}": {
        "eval": {"every": 3, "data": [{"path": "d", "split": "s"}]}, "train.steps": 10,
    },
    "max_length: 300": {"tokens.max_length": 300, "train.tokens_per_microbatch": 4800},
    "max_length: null": {"tokens.max_length": None, "train.tokens_per_microbatch": 8 * 2 * 2048},
    "{per_device_train_batch_size: 2, gradient_accumulation_steps: 4}": {
        "train.batch": 8, "train.tokens_per_microbatch": 4096,
    },
    "learning_rate: 5.0e-6": {"train.learning_rate": 5e-6},
    "lr_scheduler_type: cosine": {"train.schedule": "cosine"},
    "{lr_scheduler_type: constant_with_warmup, warmup_steps: 5}": {"train.schedule": "constant", "train.warmup": 5},
    "lr_scheduler_type: constant": {"train.schedule": "constant"},
    "warmup_steps: 0.1": {"train.warmup": 0.1},
    "warmup_ratio: 0.2": {"train.warmup": 0.2},
    "num_train_epochs: 1": {"train.epochs": 1},
    "max_steps: 7": {"train.steps": 7},
    "max_steps: -1": {},
    "optim: adamw_bnb_8bit": {"train.optimizer": "adamw_8bit"},
    "optim: paged_adamw_32bit": {"train.optimizer": "paged_adamw"},
    "weight_decay: 0.1": {"train.weight_decay": 0.1},
    "max_grad_norm: 0.3": {"train.max_grad_norm": 0.3},
    "gradient_checkpointing: true": {"train.checkpointing": True},
    "gradient_checkpointing: false": {"train.checkpointing": False},
    "activation_offloading: true": {"train.checkpointing": True, "train.offload_activations": True},
    "seed: 3": {"train.seed": 3},
    "output_dir: out": {"output.dir": "out"},
    "save_steps: 20": {"output.save_every": 20},
    "save_strategy: 'no'": {"output": None, "output.save_every": None},
    "save_total_limit: 3": {"output": {"save_every": 500, "keep": 3}},
    "{push_to_hub: true, hub_model_id: me/mine}": {"output": {"save_every": 500, "push_to": "me/mine"}},
    "logging_steps: 1": {"log.every": 1},
    "report_to: wandb": {"log": {"every": 10, "trackers": ["wandb"]}},
    "report_to: [tensorboard, trackio]": {"log": {"every": 10, "trackers": ["tensorboard", "trackio"]}},
    "report_to: none": {},
    "use_liger_kernel: true": {"model.liger": "auto"},
}  # fmt: skip


@pytest.mark.parametrize("added", TABLE)
def test_fields_become_these_keys(tmp_path: Path, added: str):
    """A snippet adds exactly these keys to TRL's defaults, and the result loads."""
    translation = snippet(TRL, tmp_path, added)
    assert flat(tables(translation)) == expected(SMALLEST, TABLE[added])
    Config.model_validate(tables(translation))


LATER: dict[str, dict[str, Any]] = {  # fields → keys
    "sync_ref_model: true": {"reference.sync": {"every": 512, "mix": 0.6}},
    "{sync_ref_model: true, ref_model_sync_steps: 8, ref_model_mixup_alpha: 0.5}": {
        "reference.sync": {"every": 8, "mix": 0.5},
    },
    "eval_steps: 0.1\neval_strategy: steps": {"eval.every": 0.1},
    "{num_train_epochs: 4, eval_strategy: epoch, save_strategy: epoch}": {
        "eval.every": 0.25, "output.save_every": 0.25,
    },
    "{adam_beta2: 0.95, adam_epsilon: 1e-6}": {"train.betas": [0.9, 0.95], "train.epsilon": 1e-6},
    "{optim: paged_lion_32bit}": {"train.optimizer": "paged_lion", "train.betas": [0.9, 0.999]},
    "{lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.1}}": {
        "train.schedule": "cosine_with_min_lr", "train.schedule_options": {"min_lr_rate": 0.1},
    },
    "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: '{\"num_cycles\": 2}'": {
        "train.schedule_options": {"num_cycles": 2},
    },
    "neftune_noise_alpha: 5": {"train.neftune_alpha": 5},
    "report_to: [comet_ml, swanlab]": {"log.trackers": ["comet_ml", "swanlab"]},
}  # fmt: skip


@pytest.mark.parametrize("added", LATER)
def test_fields_become_these_keys_too(tmp_path: Path, added: str):
    """A snippet gives these keys."""
    keys = wanted(snippet(TRL, tmp_path, added))
    assert {key: keys.get(key) for key in LATER[added]} == LATER[added]


LEFT = {
    "lora_r: 8": "lora_r: use_peft is not on, so the whole model is trained",
    "{use_peft: true, lora_dropout: 0.1}": "lora_dropout: disable_dropout, on by default, turns off",
    "disable_dropout: false": "disable_dropout: only adapters have dropout here",
    "label_smoothing: 0.1": "label_smoothing: TRL applies it to robust, exo_pair, aot, aot_unpaired only",
    "{loss_type: [sigmoid, robust], label_smoothing: 0.1}": "label_smoothing: it would smooth sigmoid too",
    "{use_peft: true, load_in_4bit: true, bnb_4bit_quant_type: fp4}": "bnb_4bit_quant_type: fp4 is not known",
    "{use_peft: true, load_in_4bit: true}": "use_bnb_nested_quant: nf4 always has double quantization",
    "fp16: true": "fp16: trained weights are float32",
    "dtype: float8": 'dtype: "float8" is not one of',
    "{datasets: [{path: a}], dataset_test_split: s}": "dataset_name: datasets goes before it",
    "datasets: [{path: a, fraction: 0.5}]": "datasets[0].fraction: there are no shares",
    "datasets: [{path: a, wrong: 1}]": "datasets[0].wrong: unknown field",
    "{datasets: [{path: a}], eval_strategy: steps}": "eval_strategy: no test_split_size holds out",
    "{datasets: [{path: a}], test_split_size: 50}": "test_split_size: a number of rows cannot be held out",
    "dataset_test_split: s": "dataset_test_split: eval_strategy is no",
    "eval_steps: 20": "eval_steps: eval_strategy is no",
    "{save_strategy: epoch, max_steps: 9}": "save_strategy: max_steps decides the length of the run",
    "{save_strategy: epoch, num_train_epochs: 1.5}": "save_strategy: the run does not end with an epoch",
    "save_strategy: best": "save_strategy: best: only steps, epoch and no are known",
    "truncation_mode: keep_end": "truncation_mode: a row that is too long loses",
    "max_length: null": "max_length: rows have a limit here",
    "desirable_weight: 0.5\nf_divergence_type: js_divergence": "f_divergence_type: means nothing to trl kto",
    "ref_model_sync_steps: 9": "ref_model_sync_steps: sync_ref_model is not on",
    "hub_model_id: me/mine": "hub_model_id: push_to_hub is not on",
    "push_to_hub: true": "push_to_hub: name the repository",
    "report_to: all": "report_to: all: log.trackers takes",
    "logging_steps: 0.1": "logging_steps: a share of all steps",
    "{lr_scheduler_type: constant, warmup_steps: 9}": "warmup_steps: lr_scheduler_type: constant has no warm-up",
    "{warmup_steps: 9, warmup_ratio: 0.1}": "warmup_ratio: warmup_steps goes before it",
    "env: {A: b}": "env: environment variables are set where",
}


@pytest.mark.parametrize("added", LEFT)
def test_what_is_lost_is_said(tmp_path: Path, added: str):
    """Each loss of information has a line with the field and the reason."""
    lines = snippet(TRL, tmp_path, added).left_out
    assert any(line.startswith(LEFT[added]) for line in lines), lines


def test_what_is_off_or_empty_is_not_listed(tmp_path: Path):
    """A field that is unset or off is not listed."""
    translation = snippet(TRL, tmp_path, "{deepspeed: null, padding_free: false, load_in_8bit: false, run_name: ''}")
    assert translation.left_out == []
    assert flat(tables(translation)) == SMALLEST


MISTAKES = {
    "model_name_or_path: null": "there is no model_name_or_path: in it",
    "model_name_or_path: 3": "model_name_or_path: must be text, got 3",
    "dataset_name: null": "there is neither dataset_name: nor datasets: in it",
    "datasets: [d]": 'datasets: must be a list of tables, each with a path, got ["d"]',
    "datasets: [{name: d}]": "datasets[0]: there is no path in it",
    "learning_rate: fast": 'learning_rate: must be a number, got "fast"',
    "per_device_train_batch_size: 1.5": "per_device_train_batch_size: must be a whole number, got 1.5",
    "use_dora: sometimes\nuse_peft: true": 'use_dora: must be true or false, got "sometimes"',
    "num_generations: 8": "num_generations: a config that has it generates completions",
    "center_rewards_coefficient: 0.01": "center_rewards_coefficient: a config that has it trains a reward model",
    "lr_scheduler_kwargs: x": 'lr_scheduler_kwargs: must be a table of keywords, got "x"',
}


@pytest.mark.parametrize("added", MISTAKES)
def test_a_mistake_is_one_message(tmp_path: Path, added: str):
    """A mistake gives one line with the file and the field; what cannot be trained here is refused."""
    with pytest.raises(UserError) as caught:
        snippet(TRL, tmp_path, added)
    assert str(caught.value).split("cfg.yml: ", 1)[1].startswith(MISTAKES[added])
    assert "\n" not in str(caught.value)


def test_the_targets_are_pefts_for_the_architecture(tmp_path: Path):
    """Without targets the modules are those that PEFT adapts in the model's architecture, if it is known."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    from fastpref.translate.trl.method import _DEFAULT_TARGETS

    assert {family: list(names) for family, names in _DEFAULT_TARGETS.items()} == {
        family: KNOWN[family] for family in _DEFAULT_TARGETS
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    translation = snippet(TRL, tmp_path, f"{{use_peft: true, model_name_or_path: {tmp_path}/model}}")
    assert wanted(translation)["lora.target"] == ["query_key_value"]
    assert "PEFT's default for gpt_neox" in translation.text


# --- Whole configs, and the command ----------------------------------------------------------------------------------

WHOLE = """
# trl dpo --config dpo.yaml
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
dataset_name: trl-lib/ultrafeedback_binarized
learning_rate: 5.0e-6
num_train_epochs: 1
per_device_train_batch_size: 2
max_steps: 1000
gradient_accumulation_steps: 8
eval_strategy: steps
eval_steps: 50
output_dir: Qwen2-0.5B-DPO
remove_unused_columns: true
use_peft: true
lora_r: 32
lora_alpha: 16
"""


def test_a_whole_config_is_written_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`init --from-trl` then `check` succeed with these values; what is left out is on stdout and in the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(WHOLE)
    output = succeed("init", "--from-trl", "run.yaml").out
    succeed("check", "run.toml")
    written = (tmp_path / "run.toml").read_text()
    got = flat(load_config(tmp_path / "run.toml").model_dump(mode="json"))
    values = {"loss.type": "dpo", "train.batch": 16, "train.steps": 1000, "eval.every": 50, "lora.rank": 32}
    assert {key: got[key] for key in values} == values
    assert "the file does not say, so `trl dpo` is taken" in written
    for line in translate(TRL.dialect, tmp_path / "run.yaml", tmp_path).left_out:
        assert f"\n  {line}\n" in output
        assert f"\n#   {line}\n" in written


def test_the_loss_is_that_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """--loss says which command a config is for; other losses and other options are refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(WHOLE)
    output = succeed("init", "--from-trl", "run.yaml", "--loss", "KTO", "--output", "-").out
    assert 'type = "kto"  # as --loss says' in output
    for arguments, message in {
        ("--loss", "orpo"): "--loss orpo: TRL's commands that fastpref can follow are dpo, kto, sft",
        ("--model", "m"): "--from-trl takes the model and the data from its file",
        ("--from-axolotl", "a.yml"): "--from-axolotl and --from-trl both name a config",
    }.items():
        result = run_command("init", "--from-trl", "run.yaml", *arguments)
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith(f"fastpref: {message}")


SHOWN = {
    "undesirable_weight: 1.0": "undesirable_weight is in the file, so `trl kto` is taken",
    "loss_type: apo_zero_unpaired": "loss_type is in the file, so `trl kto` is taken",
    "packing: true": "packing is in the file, so `trl sft` is taken",
    "loss_type: [sigmoid]": "the file does not say, so `trl dpo` is taken",
}


@pytest.mark.parametrize("added", SHOWN)
def test_the_fields_show_the_method(tmp_path: Path, added: str):
    """Without --loss, the fields decide, and the file says so."""
    if "sft" in SHOWN[added] and "sft" not in LOSSES:
        pytest.skip("the loss sft is not here")
    assert SHOWN[added] in snippet(TRL, tmp_path, added).text


@pytest.mark.skipif("sft" not in LOSSES, reason="the loss sft is not here")
def test_supervised_training_has_its_own_defaults(tmp_path: Path):
    """`trl sft` has a higher learning rate, and dropout of adapters."""
    (tmp_path / "cfg.yml").write_text(yaml.safe_dump({**TRL.smallest, "use_peft": True}))
    got = wanted(translate(TRL.dialect, tmp_path / "cfg.yml", tmp_path, "sft"))
    assert (got["train.learning_rate"], got["lora.dropout"], got["loss.type"]) == (2e-5, 0.05, "sft")
    assert got["train.tokens_per_microbatch"] == 8 * 1024
    assert "tokens.score" not in got


def test_relative_paths_keep_their_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A path that TRL finds from here is found by a config in another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "d.jsonl").write_text("{}")
    added = "{model_name_or_path: ./model, datasets: [{path: json, data_files: d.jsonl}]}"
    translation = snippet(TRL, tmp_path, added, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c.toml").write_text(translation.text)
    monkeypatch.chdir("/")
    config = load_config(tmp_path / "out" / "c.toml")
    assert (config.model.name, config.data[0].path) == (str(tmp_path / "model"), str(tmp_path / "d.jsonl"))


def test_the_fields_are_those_of_the_installed_trl():
    """Every field of TRL's command line has a rule or a reason, and so has every key of an entry of `datasets`."""
    from trl import DatasetMixtureConfig, DPOConfig, KTOConfig, ModelConfig, ScriptArguments, SFTConfig
    from trl.scripts.utils import DatasetConfig

    schemas: list[Any] = [ScriptArguments, DPOConfig, KTOConfig, SFTConfig, ModelConfig, DatasetMixtureConfig]
    names = {field.name for schema in schemas for field in fields(schema)}
    assert [name for name in names - TRL.ruled if TRL.dialect.reason_for(name) is None] == []
    assert set(TRL_OWN) - names == {"env"}
    assert {field.name for field in fields(DatasetConfig)} == set(rows.KEYS) | set(rows.LEFT_OUT)


def test_the_defaults_are_those_of_the_installed_trl(tmp_path: Path):
    """The defaults that are written out are TRL's."""
    from trl import DPOConfig, ModelConfig, SFTConfig

    values = {field.name: field.default for field in (*fields(ModelConfig), *fields(DPOConfig))}
    got = wanted(snippet(TRL, tmp_path, "{use_peft: true, disable_dropout: false, eval_strategy: steps}"))
    assert values["lora_r"] == 16
    assert values["lora_alpha"] == 32
    for name, key in {
        "learning_rate": "train.learning_rate", "lr_scheduler_type": "train.schedule", "warmup_steps": "train.warmup",
        "num_train_epochs": "train.epochs", "per_device_train_batch_size": "train.batch", "save_steps":
        "output.save_every", "logging_steps": "log.every", "max_length": "tokens.max_length", "lora_dropout":
        "lora.dropout",
    }.items():  # fmt: skip
        assert got[key] == values[name], name
    assert next(field.default for field in fields(SFTConfig) if field.name == "learning_rate") == 2e-5
