"""Translation of Axolotl's configs: single fields, whole configs, and what is left out with its reason."""

import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpref.config import Config, load_config
from fastpref.config.formats import options_of
from fastpref.config.losses import LOSSES
from fastpref.errors import UserError
from fastpref.translate import Translation, translate
from fastpref.translate.axolotl import rows
from tests.support.axolotl_configs import DPO, ENTRY_FIELDS, IPO, KTO_QLORA, ORPO, SIMPO
from tests.support.command_line import succeed
from tests.support.translations import TRAINERS, expected, flat, tables, wanted

AXOLOTL = TRAINERS["Axolotl"]
HEAD = {"base_model": "base_model: m", "rl": "rl: dpo", "datasets": "datasets: [{path: d}]"}
ALWAYS = {  # the translation of the smallest config
    "model": {"name": "m"},
    "loss": {"type": "dpo"},
    "data": [{"path": "d"}],
    "tokens": {"max_length": 512, "overlong": "drop"},
    "train": {"warmup": 0.03, "batch": 1, "tokens_per_microbatch": 1024},
}


def translated(folder: Path, added: str, out: Path | None = None) -> Translation:
    """Return the translation of a YAML text, after adding the missing fields that every config needs."""
    added = textwrap.dedent(added)
    if added.startswith("{"):
        added = yaml.safe_dump(yaml.safe_load(added))
    lines = [line for field, line in HEAD.items() if f"\n{field}:" not in f"\n{added}"]
    path = folder / "cfg.yml"
    path.write_text("\n".join([*lines, added]), encoding="utf-8")
    return translate(AXOLOTL.dialect, path, out or folder)


SMALLEST = flat(ALWAYS)
CHAT, FORMAT = "datasets: [{path: d, type: chat_template.default, ", {"type": "chat_template.default"}
# Axolotl's fields → what they add to or change in the smallest config.
TABLE: dict[str, dict[str, Any]] = {
    "": {},
    "revision_of_model: v1": {"model.revision": "v1"},
    "model_revision: v1": {"model.revision": "v1"},
    "trust_remote_code: true": {"model.trust_remote_code": True},
    "bf16: auto": {},
    "bf16: true": {"model.dtype": "bfloat16"},
    "bf16: full": {"model.dtype": "bfloat16"},
    "bfloat16: true": {"model.dtype": "bfloat16"},
    "{fp16: true, bf16: false, adapter: lora}": {"model.dtype": "float16", "lora": {}},
    "{float16: true, adapter: lora}": {"model.dtype": "float16", "lora": {}},
    "{fp16: true, bf16: false}": {},
    "float16: true": {},
    "bf16: false": {"model.dtype": "float32"},
    "float32: true": {"model.dtype": "float32"},
    "adapter: lora": {"lora": {}},
    "{adapter: lora, lora_r: 8, lora_alpha: 16, lora_dropout: 0}": {"lora": {"rank": 8, "alpha": 16, "dropout": 0}},
    "{adapter: lora, lora_target_linear: true}": {"lora.target": "all-linear"},
    "{adapter: lora, lora_target_modules: [q_proj, lm_head]}": {"lora.target": ["q_proj", "lm_head"]},
    "{adapter: lora, lora_target_modules: q_proj}": {"lora.target": ["q_proj"]},
    r"{adapter: lora, lora_target_modules: 'layers.[\d]+.(up|q)_proj'}": {"lora.target": r"layers.[\d]+.(up|q)_proj"},
    "{adapter: lora, lora_modules_to_save: [embed_tokens]}": {"lora.modules_to_save": ["embed_tokens"]},
    "{adapter: lora, peft_use_dora: true, peft_use_rslora: true}": {"lora.dora": True, "lora.rslora": True},
    "rl: ipo": {"loss.type": "ipo"},
    "rl: kto": {"loss.type": "kto", "train.batch": None},
    "rl: orpo": {"loss.type": "orpo", "loss.nll_on": "all"},
    "rl: simpo": {"loss.type": "simpo", "loss.beta": 0.1, "loss.gamma": 0.5, "loss.sft_weight": 1.0},
    "{rl: simpo, rl_beta: 2, simpo_gamma: 1.5, cpo_alpha: 0}": {
        "loss": {"type": "simpo", "beta": 2, "gamma": 1.5, "sft_weight": 0}
    },
    "rl_beta: 0.3": {"loss.beta": 0.3},
    "dpo_beta: 0.3": {"loss.beta": 0.3},
    "{trl: {beta: 0.2}, rl_beta: 0.3}": {"loss.beta": 0.2},
    "{rl: orpo, orpo_alpha: 0.4}": {"loss.type": "orpo", "loss.nll_on": "all", "loss.beta": 0.4},
    "{dpo_loss_type: [ipo]}": {"loss.variants": ["ipo"]},
    "{dpo_loss_type: hinge}": {"loss.variants": ["hinge"]},
    "{dpo_loss_type: [sigmoid, bco_pair, sft], dpo_loss_weights: [0.8, 0.2, 1]}": {
        "loss": {"variants": ["sigmoid", "bco_pair", "sft"], "weights": [0.8, 0.2, 1]}
    },
    "rpo_alpha: 0.5": {"loss.variants": ["sigmoid", "sft"], "loss.weights": [1.0, 0.5]},
    "{dpo_loss_type: [hinge], dpo_loss_weights: [2], rpo_alpha: 0.5}": {
        "loss": {"variants": ["hinge", "sft"], "weights": [2, 0.5]}
    },
    "dpo_norm_loss: true": {"loss.variants": ["sigmoid_norm"]},
    "dpo_label_smoothing: 0.1": {"loss.label_smoothing": 0.1},
    "{dpo_loss_type: [exo_pair], dpo_label_smoothing: 0.01}": {
        "loss": {"variants": ["exo_pair"], "label_smoothing": 0.01}
    },
    "dpo_use_weighting: true": {"loss.weighting": True},
    "{rl: kto, micro_batch_size: 2, kto_desirable_weight: 0.2, kto_undesirable_weight: 0}": {
        "loss": {"type": "kto", "desirable_weight": 0.2, "undesirable_weight": 1.0},
        "train": {"batch": 2, "tokens_per_microbatch": 2048},
    },
    "datasets: [{path: p, split: s, name: n, revision: r}]": {
        "data": [{"path": "p", "split": "s", "name": "n", "revision": "r"}]
    },
    "datasets: [{path: p, type: chatml.intel}, {path: q, type: llama3}]": {
        "data": [{"path": "p", "format": "chatml.intel"}, {"path": "q", "format": "llama3.default"}]
    },
    "datasets: [{path: d, type: passthrough}]": {"data.0.format": "passthrough"},
    "datasets: [{path: d, type: chat_template}]": {"data.0.format": "chat_template.default"},
    "datasets: [{path: d, type: {field_prompt: q, field_chosen: c, field_system: null}}]": {
        "data.0.format": {"field_prompt": "q", "field_chosen": "c"}
    },
    "datasets: [{path: json, data_files: [a.jsonl, b.jsonl], ds_type: json, type: chatml.icr}]": {
        "data": [{"path": "a.jsonl", "format": "chatml.icr"}, {"path": "b.jsonl", "format": "chatml.icr"}]
    },
    "datasets: [{path: json, data_files: a.jsonl}]": {"data.0.path": "a.jsonl"},
    CHAT + "field_messages: talk, field_chosen: c, field_rejected: r}]": {
        "data.0.format": FORMAT | {"field_messages": "talk", "field_chosen": "c", "field_rejected": "r"}
    },
    CHAT + "field_tools: t, roles: {user: [me]}}]": {
        "data.0.format": FORMAT | {"roles": {"user": ["me"]}, "tools": "t"}
    },
    CHAT + "message_property_mappings: {role: by}, message_field_content: words}]": {
        "data.0.format": FORMAT | {"message_property_mappings": {"content": "words", "role": "by"}}
    },
    CHAT + "chat_template: llama3}]": {"data.0.format": FORMAT | {"chat_template": "llama3"}},
    CHAT + "chat_template: jinja, chat_template_jinja: '{{ x }}'}]": {
        "data.0.format": FORMAT | {"chat_template": "{{ x }}"}
    },
    "test_datasets: [{path: h, type: chatml.ultra, split: test}]": {
        "eval.data": [{"path": "h", "split": "test", "format": "chatml.ultra"}]
    },
    "val_set_size: 0.1": {"eval.fraction": 0.1},
    "val_set_size: 0": {},
    "{val_set_size: 0.1, eval_steps: 20}": {"eval.fraction": 0.1, "eval.every": 20},
    "{val_set_size: 0.1, eval_steps: 0.1, max_steps: 200}": {
        "eval": {"fraction": 0.1, "every": 20},
        "train.steps": 200,
    },
    "{generate_samples: true, num_generation_samples: 2}": {"eval.samples": 2, "eval.sample_tokens": 50},
    "{generate_samples: true, generation_max_new_tokens: 9}": {"eval.samples": 3, "eval.sample_tokens": 9},
    "{sequence_len: 1000, max_prompt_len: 300}": {
        "tokens": {"max_length": 1000, "max_prompt_length": 300},
        "train.tokens_per_microbatch": 2000,
    },
    "excess_length_strategy: drop": {},
    "excess_length_strategy: truncate": {"tokens.overlong": "truncate"},
    "excess_length_strategy: raise": {"tokens.overlong": "error"},
    "dataset_exact_deduplication: true": {"tokens.duplicates": "drop"},
    "chat_template: chatml": {"tokens.chat_template": "chatml"},
    "chat_template: tokenizer_default": {},
    "chat_template_jinja: '{{ x }}'": {"tokens.chat_template": "{{ x }}"},
    "chat_template_kwargs: {enable_thinking: false, reasoning_effort: low, builtin_tools: null}": {
        "tokens.chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"}
    },
    "chat_template_kwargs: {}": {},
    "learning_rate: 1e-4": {"train.learning_rate": 1e-4},  # YAML reads this number as text
    "lr_scheduler: linear": {"train.schedule": "linear"},
    "{lr_scheduler: constant_with_warmup, warmup_steps: 5}": {"train.schedule": "constant", "train.warmup": 5},
    "lr_scheduler: constant": {"train.schedule": "constant", "train.warmup": 0},
    "warmup_steps: 10": {"train.warmup": 10},
    "warmup_ratio: 0.2": {"train.warmup": 0.2},
    "warmup_ratio: 0.0": {"train.warmup": 0.0},
    "max_steps: 7": {"train.steps": 7},
    "max_steps: -1": {},
    "{gradient_accumulation_steps: 4, micro_batch_size: 2, sequence_len: 100}": {
        "train": {"batch": 8, "tokens_per_microbatch": 400},
        "tokens.max_length": 100,
    },
    "{batch_size: 32, micro_batch_size: 2}": {"train.batch": 32, "train.tokens_per_microbatch": 2048},
    "optimizer: adamw_torch_fused": {"train.optimizer": "adamw"},
    "weight_decay: 0.1": {"train.weight_decay": 0.1},
    "max_grad_norm: 0.3": {"train.max_grad_norm": 0.3},
    "gradient_checkpointing: true": {"train.checkpointing": True},
    "gradient_checkpointing: false": {"train.checkpointing": False},
    "gradient_checkpointing: offload": {"train.checkpointing": True, "train.offload_activations": True},
    "activation_offloading: true": {"train.checkpointing": True, "train.offload_activations": True},
    "activation_offloading: false": {},
    "seed: 3": {"train.seed": 3},
    "output_dir: ./out": {"output.dir": "./out"},
    "logging_steps: 5": {"log.every": 5},
    # The weights in 4 or 8 bits need a table [lora], which comes after them.
    "{adapter: qlora, load_in_4bit: true}": {"lora": {}, "model.quantization": "nf4"},
    "{adapter: lora, load_in_8bit: true}": {"lora": {}, "model.quantization": "int8"},
    "{adapter: lora, peft: {backend: bnb, weight_dtype: nf4}}": {"lora": {}, "model.quantization": "nf4"},
    "liger_rope: true": {"model.liger": "auto"},
    "optimizer: adamw_bnb_8bit": {"train.optimizer": "adamw_8bit"},
    "optimizer: paged_adamw": {"train.optimizer": "paged_adamw"},
    "optimizer: paged_adamw_32bit": {"train.optimizer": "paged_adamw"},
    "optimizer: paged_adamw_8bit": {"train.optimizer": "paged_adamw_8bit"},
    "precompute_ref_log_probs: true": {"reference.mode": "precompute"},
    "save_steps: 100": {"output": {"save_every": 100, "keep": 4}},
    "save_total_limit: 2": {"output.keep": 2},
    "hub_model_id: me/mine": {"output.push_to": "me/mine"},
    "wandb_project: x": {"log.trackers": ["wandb"]},
    "{use_mlflow: true, use_tensorboard: true}": {"log.trackers": ["mlflow", "tensorboard"]},
}


@pytest.mark.parametrize("added", TABLE)
def test_fields_become_these_keys(tmp_path: Path, added: str):
    """A snippet adds exactly these keys to the smallest config, and the result loads."""
    translation = translated(tmp_path, added)
    assert flat(tables(translation)) == expected(SMALLEST, TABLE[added])
    Config.model_validate(tables(translation))


LATER: dict[str, dict[str, Any]] = {  # fields → keys
    "{adapter: lora, lora_model_dir: a}": {"lora.from": "a"},
    "{adapter: lora, loraplus_lr_ratio: 16}": {"lora.plus_ratio": 16},
    "{adapter: lora, peft_init_lora_weights: pissa_niter_4}": {"lora.init": "pissa_niter_4"},
    "{adapter: qlora, peft: {loftq_config: {loftq_bits: 4}}}": {"lora.init": "loftq"},
    "{adapter: lora, peft_layers_to_transform: [0, 1]}": {"lora.layers": [0, 1]},
    "{adam_beta1: 0.8, adam_epsilon: 1e-6}": {"train.betas": [0.8, 0.999], "train.epsilon": 1e-6},
    "{lr_scheduler: cosine_with_restarts, lr_scheduler_kwargs: {num_cycles: 2}}": {
        "train.schedule": "cosine_with_restarts", "train.schedule_options": {"num_cycles": 2},
    },
    "{learning_rate: 2e-4, cosine_min_lr_ratio: 0.1}": {"train.min_lr": 2e-5},
    "optimizer: lion_8bit": {"train.optimizer": "lion_8bit", "train.betas": [0.9, 0.999]},
    "optimizer: adafactor": {"train.optimizer": "adafactor"},
    "optimizer: muon": {"train.optimizer": "muon"},
    "optimizer: schedule_free_adamw": {"train.optimizer": "schedule_free_adamw"},
    "neftune_noise_alpha: 5": {"train.neftune_alpha": 5},
    "{early_stopping_patience: 3, metric_for_best_model: eval_rewards/accuracies}": {
        "train.stop": {"after": 3, "metric": "eval/rewards/accuracies"},
    },
    "early_stopping_patience: 2": {"train.stop": {"after": 2, "metric": "eval/loss"}},
    "trl: {sync_ref_model: true}": {"reference.sync": {"every": 64, "mix": 0.9}},
    "trl: {sync_ref_model: true, ref_model_sync_steps: 8, ref_model_mixup_alpha: 0.5}": {
        "reference.sync": {"every": 8, "mix": 0.5},
    },
    "{tokens: [<a>], special_tokens: {additional_special_tokens: [<b>]}}": {"tokens.add": ["<a>", "<b>"]},
    "eval_steps: 0.1": {"eval.every": 0.1},
    "{num_epochs: 2, evals_per_epoch: 4, saves_per_epoch: 1}": {"eval.every": 0.125, "output.save_every": 0.5},
    "{num_epochs: 4, eval_strategy: epoch}": {"eval.every": 0.25, "output.save_every": 0.25, "output.keep": 4},
    "save_steps: 0.2": {"output.save_every": 0.2},
    "num_epochs: 4": {"train.epochs": 4, "output.save_every": 0.25, "output.keep": 4},
    "use_comet: true": {"log.trackers": ["comet_ml"]},
}  # fmt: skip


@pytest.mark.parametrize("added", LATER)
def test_fields_become_these_keys_too(tmp_path: Path, added: str):
    """A snippet gives these keys."""
    keys = wanted(translated(tmp_path, added))
    assert {key: keys.get(key) for key in LATER[added]} == LATER[added]


SUPERVISED = """
rl:
datasets:
  - {path: d, type: chat_template, field_messages: talk}
adapter: lora
lora_dropout: 0.1
micro_batch_size: 2
"""


@pytest.mark.skipif("sft" not in LOSSES, reason="the loss sft is not here")
def test_supervised_training_on_conversations_is_sft(tmp_path: Path):
    """A config without rl whose datasets are conversations trains on the assistant's turns, with dropout."""
    got = flat(tables(translated(tmp_path, SUPERVISED)))
    assert got["loss.type"] == "sft"
    assert got["lora.dropout"] == 0.1
    assert got["train.tokens_per_microbatch"] == 2 * 512
    assert got["data.0.format"] == {"type": "chat_template.default", "field_messages": "talk"}


OTHER_SUPERVISED = {
    "datasets: [{path: d, type: alpaca}]": "datasets[0] is not of type chat_template",
    "datasets: [{path: d, type: chat_template, roles_to_train: [user]}]": "datasets[0].roles_to_train selects",
    "{datasets: [{path: d, type: chat_template}], train_on_inputs: true}": "train_on_inputs trains on prompts too",
    "{datasets: [{path: d, type: chat_template}], reward_model: true}": "it trains a reward model",
    "{pretraining_dataset: [{path: c4}], datasets: [{path: d, type: chat_template}]}": "it has no datasets of convers",
}


@pytest.mark.parametrize("added", OTHER_SUPERVISED)
def test_other_supervised_training_is_refused(tmp_path: Path, added: str):
    """A config without rl that trains on other than assistant turns is refused, with what makes it other."""
    text = yaml.safe_dump(yaml.safe_load(added) | {"rl": None})
    with pytest.raises(UserError, match="there is no rl: in it, so it trains on no preferences, and its") as caught:
        translated(tmp_path, text)
    assert OTHER_SUPERVISED[added] in str(caught.value)


REFUSED = {  # a field → the key and the value that the schema refuses
    "lr_scheduler: rex": ("train", "schedule", "rex"),
    "optimizer: came_pytorch": ("train", "optimizer", "came_pytorch"),
    "max_grad_norm: 0": ("train", "max_grad_norm", 0),
    "dpo_loss_weights: [1, 2]": ("loss", "weights", [1, 2]),
    "eval_steps: 20": ("eval", "every", 20),
    "datasets: [{path: d, type: my.own}]": ("data", "format", "my.own"),
}


@pytest.mark.parametrize("added", REFUSED)
def test_what_the_schema_refuses_is_a_comment_with_its_reason(tmp_path: Path, added: str):
    """A line that the schema refuses is commented out and listed with its reason."""
    translation = translated(tmp_path, added)
    section, key, value = REFUSED[added]
    ((setting, reason),) = translation.refused
    assert (setting.key[0], setting.key[-1], setting.value) == (section, key, value)
    assert reason
    assert f"\n#{key} = " in translation.text
    assert any(reason in line for line in translation.left_out)
    Config.model_validate(tables(translation))


def test_a_refused_key_is_taken_once_the_schema_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only the schema's own answer decides whether a key is translated."""
    monkeypatch.setattr("fastpref.translate.translation.mistake", lambda raw: None)
    translation = translated(tmp_path, "adapter: qlora\nload_in_4bit: true\nsave_steps: 10")
    assert translation.refused == ()
    assert flat(tables(translation))["model.quantization"] == "nf4"
    assert flat(tables(translation))["output.save_every"] == 10


# --- Whole configs ---------------------------------------------------------------------------------------------------

WHOLE = {
    "dpo": (DPO, {"loss.type": "dpo", "train.batch": 8, "train.epochs": 4.0, "eval.fraction": 0.05}),
    "kto": (KTO_QLORA, {"loss.beta": 0.5, "loss.desirable_weight": 0.2, "lora.rank": 32, "train.batch": 2}),
    "orpo": (ORPO, {"loss.beta": 0.2, "lora.target": ["q_proj", "v_proj"], "tokens.chat_template": "chatml",
                    "train.learning_rate": 8e-6, "train.seed": 7, "train.batch": 16}),
    "simpo": (SIMPO, {"loss.gamma": 1.25, "loss.sft_weight": 0.0, "eval.every": 50, "train.steps": 500,
                      "train.batch": 32, "model.dtype": "auto"}),
    "ipo": (IPO, {"loss.beta": 0.05, "lora.dora": True, "lora.rslora": True, "tokens.duplicates": "drop",
                  "tokens.max_prompt_length": 256, "model.trust_remote_code": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_config_is_written_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """`init --from-axolotl` then `check` succeed with these values; what is left out is on stdout and in the file."""
    monkeypatch.chdir(tmp_path)
    text, wanted = WHOLE[name]
    (tmp_path / f"{name}-run.yml").write_text(text)
    output = succeed("init", "--from-axolotl", f"{name}-run.yml").out
    succeed("check", f"{name}-run.toml")
    written = (tmp_path / f"{name}-run.toml").read_text()
    got = flat(load_config(tmp_path / f"{name}-run.toml").model_dump(mode="json"))
    assert {key: got[key] for key in wanted} == wanted
    assert got["loss.type"] == name
    for line in translate(AXOLOTL.dialect, tmp_path / f"{name}-run.yml", tmp_path).left_out:
        assert f"\n  {line}\n" in output
        assert f"\n#   {line}\n" in written


# --- Nothing is lost silently ----------------------------------------------------------------------------------------


def test_every_key_of_a_table_of_data_is_translated_or_has_a_reason():
    """Every field of an entry of Axolotl's schema is translated or left out with a reason."""
    assert [field for field in ENTRY_FIELDS if (field in rows.KEYS) == (field in rows.LEFT_OUT)] == []


@pytest.mark.parametrize("field", sorted(set(rows.LEFT_OUT) | {"unheard_of"}))
def test_a_field_of_an_entry_without_a_counterpart_is_listed(tmp_path: Path, field: str):
    """A field of `datasets` without a counterpart is listed with the entry's number."""
    translation = translated(tmp_path, f"datasets: [{{path: d}}, {{path: e, {field}: x}}]")
    assert f"datasets[1].{field}: {rows.LEFT_OUT.get(field, 'unknown field')}" in translation.left_out


LEFT = {
    "mystery: 3": "mystery: unknown field",
    "trl: {mystery: 3}": "trl.mystery: unknown field",
    "sample_packing: false": "sample_packing: rows are packed without padding",
    "simpo_gamma: 1": "simpo_gamma: means nothing to rl: dpo",
    "orpo_alpha: 1": "orpo_alpha: means nothing to rl: dpo",
    "rl: ipo\ndpo_label_smoothing: 0.1": "dpo_label_smoothing: means nothing to rl: ipo",
    "dpo_loss_type: [ipo]\ndpo_label_smoothing: 0.1": "dpo_label_smoothing: would be loss.label_smoothing = 0.1: ",
    "trl: {beta: 0.2}\nrl_beta: 0.3": "rl_beta: trl.beta goes before it",
    "lora_r: 8": "lora_r: there is no adapter:, so the whole model is trained",
    "adapter: lora\nlora_target_linear: true\nlora_target_modules: [q]": "lora_target_modules: lora.target = ",
    "chat_template: qwen_25": 'chat_template: "qwen_25" is not a template of fastpref',
    "chat_template: tokenizer_default_fallback_chatml": "chat_template: the tokenizer's own template is used",
    "val_set_size: 100": "val_set_size: a number of rows cannot be held out",
    "val_set_size: 0.1\ntest_datasets: [{path: h}]": "val_set_size: test_datasets are held out",
    "adapter: lora\nlora_dropout: 0.1": "lora_dropout: TRL turns all dropout off in preference training",
    "adapter: lora\nlora_model_dir: a\nlora_r: 8": "lora_r: the adapter of lora_model_dir has its own",
    "adapter: lora\npeft: {loftq_config: {loftq_bits: 8}}": "peft.loftq_config: LoftQ has 4 bits here, not 8",
    "special_tokens: {pad_token: x}": "special_tokens: pad_token: the tokenizer keeps the tokens",
    "max_steps: 9\neval_strategy: epoch": "eval_strategy: max_steps decides the length of the run",
    "trl: {ref_model_sync_steps: 9}": "trl.ref_model_sync_steps: trl.sync_ref_model is not on",
    "cosine_min_lr_ratio: 0.1\nlr_scheduler: linear": "cosine_min_lr_ratio: lr_scheduler: linear does not read it",
    "load_best_model_at_end: true": "load_best_model_at_end: final/ is the last model",
    "gradient_checkpointing: offload_disk": "gradient_checkpointing: offload_disk: activations go to host memory",
    "datasets: [{path: 's3://b/d.jsonl'}]": "datasets[0].path: s3:// is not read",
    "datasets: [{path: org/d, data_files: [a.json]}]": "datasets[0].data_files: single files of a hub data set",
    "datasets: [{path: d, type: chatml.intel, field_chosen: c}]": "datasets[0].field_chosen: only formats ",
    "rl: kto": "gradient_accumulation_steps, micro_batch_size: would be train.batch = 1: KTO compares",
}


@pytest.mark.parametrize("added", LEFT)
def test_what_is_lost_is_said(tmp_path: Path, added: str):
    """Each loss of information has a line with the field and the reason."""
    lines = translated(tmp_path, added).left_out
    assert any(line.startswith(LEFT[added]) for line in lines), lines


def test_what_is_off_or_empty_is_not_listed(tmp_path: Path):
    """A field that is unset or off is not listed."""
    translation = translated(
        tmp_path, "deepspeed:\nfsdp: []\nflash_attention: false\nwandb_project: ''\ntokens:\nload_in_8bit: false"
    )
    assert translation.left_out == []
    assert flat(tables(translation)) == SMALLEST


# --- Paths, and mistakes ---------------------------------------------------------------------------------------------


def test_relative_paths_keep_their_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A path that Axolotl finds from here is found by a config in another folder, even next to a file of that name."""
    monkeypatch.chdir(tmp_path)
    for name in ("d.jsonl", "t.jinja", "more/a.jsonl", "out/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "model").mkdir()
    added = """
        base_model: ./model
        chat_template_jinja: t.jinja
        datasets:
          - {path: d.jsonl, type: chat_template.default, chat_template_jinja: t.jinja}
          - {path: more, data_files: [a.jsonl]}
          - {path: org/name}
    """
    translation = translated(tmp_path, added, tmp_path / "out")
    (tmp_path / "out" / "c.toml").write_text(translation.text)
    monkeypatch.chdir("/")
    config = load_config(tmp_path / "out" / "c.toml")
    assert config.model.name == str(tmp_path / "model")
    assert config.tokens.chat_template == str(tmp_path / "t.jinja")
    paths = [str(tmp_path / "d.jsonl"), str(tmp_path / "more/a.jsonl"), "org/name"]
    assert [data.path for data in config.data] == paths
    assert config.data[0].format == {"type": "chat_template.default", "chat_template": str(tmp_path / "t.jinja")}


MISTAKES = {
    "base_model: [": "cfg.yml:3: not valid YAML: ",
    "rl: grpo": "cfg.yml: rl: grpo: GRPO generates while it trains; fastpref trains rl: dpo, ipo, orpo, simpo, kto",
    "rl: ppo": "cfg.yml: rl: ppo: this method is not known here; fastpref trains",
    "rl: [dpo]": 'cfg.yml: rl: ["dpo"]: this method is not known here',
    "rl:": "cfg.yml: there is no rl: in it, so it trains on no preferences",
    "base_model:": "cfg.yml: there is no base_model: in it",
    "base_model: 3": "cfg.yml: base_model: must be text, got 3",
    "datasets:": "cfg.yml: there is no datasets: in it",
    "datasets: [d]": 'cfg.yml: datasets: must be a list of tables, each with a path, got ["d"]',
    "datasets: [{type: chatml.intel}]": "cfg.yml: datasets[0]: there is no path in it",
    "test_datasets: {path: d}": "cfg.yml: test_datasets: must be a list of tables",
    "trl: 3": "cfg.yml: trl: must be a table of fields, got 3",
    "adapter: llama-adapter": "cfg.yml: adapter: llama-adapter: fastpref trains lora, qlora, or the whole model",
    "learning_rate: fast": 'cfg.yml: learning_rate: must be a number, got "fast"',
    "micro_batch_size: 1.5": "cfg.yml: micro_batch_size: must be a whole number, got 1.5",
    "trust_remote_code: sometimes": 'cfg.yml: trust_remote_code: must be true or false, got "sometimes"',
    "seed: .inf": "cfg.yml: seed: must be a whole number",
}


@pytest.mark.parametrize("added", MISTAKES)
def test_a_mistake_is_one_message(tmp_path: Path, added: str):
    """A mistake gives one line with the file and the field; what cannot be trained here is refused."""
    with pytest.raises(UserError) as caught:
        translated(tmp_path, added)
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(MISTAKES[added])
    assert "\n" not in str(caught.value)


def test_the_options_of_chats_exist():
    """Every option of a chat format that the page names exists."""
    options = {how.split("`")[1].split(".")[1] for how in rows.KEYS.values() if how.startswith("`format.")}
    assert options <= set(options_of("chat_template.default"))
