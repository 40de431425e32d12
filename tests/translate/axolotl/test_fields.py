"""Translation of Axolotl's configs, field by field."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpref.config import Config
from fastpref.errors import UserError
from tests.support.translations import axolotl, expected, flat, tables, taken

ALWAYS = {  # the translation of the smallest config
    "model": {"name": "m"},
    "loss": {"type": "dpo"},
    "data": [{"path": "d"}],
    "tokens": {"max_length": 512, "overlong": "drop"},
    "train": {"warmup": 0.03, "batch": 1, "tokens_per_microbatch": 1024},
}


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
    translation = axolotl(tmp_path, added)
    assert flat(tables(translation)) == expected(SMALLEST, TABLE[added])
    Config.model_validate(tables(translation))


MORE: dict[str, dict[str, Any]] = {  # fields → keys
    "{adapter: lora, lora_model_dir: a}": {"lora.from": "a"},
    "{adapter: lora, loraplus_lr_ratio: 16}": {"lora.plus_ratio": 16},
    "{adapter: lora, peft_init_lora_weights: pissa_niter_4}": {"lora.init": "pissa_niter_4"},
    "{adapter: qlora, rl: simpo, peft: {loftq_config: {loftq_bits: 4}}}": {"lora.init": "loftq"},
    "{adapter: lora, lora_target_parameters: [mlp.experts.down_proj]}": {"lora.target": ["mlp.experts.down_proj"]},
    "{adapter: lora, lora_target_modules: [q_proj], lora_target_parameters: [experts.up]}": {
        "lora.target": ["q_proj", "experts.up"],
    },
    "{adapter: lora, lora_target_linear: true, lora_target_modules: [lm_head]}": {
        "lora.target": ["all-linear", "lm_head"],
    },
    "unfrozen_parameters: [^lm_head.weight$, 'model.layers.2[0-9]+.']": {
        "train.freeze": [r"(?!(?:(?:^lm_head.weight$)|(?:model.layers.2[0-9]+.))).*\.(?:weight|bias)"],
    },
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
    "{val_set_size: 0.1, eval_steps: 5, early_stopping_patience: 3, metric_for_best_model: eval_rewards/accuracies}": {
        "train.stop": {"after": 3, "metric": "eval/rewards/accuracies"},
    },
    "{val_set_size: 0.1, eval_steps: 5, early_stopping_patience: 2}": {
        "train.stop": {"after": 2, "metric": "eval/loss"},
    },
    "trl: {sync_ref_model: true}": {"reference.mode": "copy", "reference.sync": {"every": 64, "mix": 0.9}},
    "trl: {sync_ref_model: true, ref_model_sync_steps: 8, ref_model_mixup_alpha: 0.5}": {
        "reference.mode": "copy",
        "reference.sync": {"every": 8, "mix": 0.5},
    },
    "{tokens: [<a>], special_tokens: {additional_special_tokens: [<b>]}}": {"tokens.add": ["<a>", "<b>"]},
    "{val_set_size: 0.1, eval_steps: 0.1}": {"eval.every": 0.1},
    "{val_set_size: 0.1, num_epochs: 2, evals_per_epoch: 4, saves_per_epoch: 1}": {
        "eval.every": 0.125, "output.save_every": 0.5,
    },
    "{val_set_size: 0.1, num_epochs: 4, eval_strategy: epoch}": {
        "eval.every": 0.25, "output.save_every": 0.25, "output.keep": 4,
    },
    "save_steps: 0.2": {"output.save_every": 0.2},
    "num_epochs: 4": {"train.epochs": 4, "output.save_every": 0.25, "output.keep": 4},
    "use_comet: true": {"log.trackers": ["comet_ml"]},
}  # fmt: skip


@pytest.mark.parametrize("added", MORE)
def test_fields_become_these_keys_too(tmp_path: Path, added: str):
    """A snippet gives these keys, which the schema takes."""
    assert taken(axolotl(tmp_path, added), MORE[added]) == MORE[added]


SUPERVISED = """
rl:
datasets:
  - {path: d, type: chat_template, field_messages: talk}
adapter: lora
lora_dropout: 0.1
micro_batch_size: 2
"""


def test_supervised_training_on_conversations_is_sft(tmp_path: Path):
    """A config without rl whose datasets are conversations trains on the assistant's turns, with dropout."""
    got = flat(tables(axolotl(tmp_path, SUPERVISED)))
    assert got["loss.type"] == "sft"
    assert got["lora.dropout"] == 0.1
    assert got["train.tokens_per_microbatch"] == 2 * 512
    assert got["data.0.format"] == {"type": "chat_template.default", "field_messages": "talk"}


def test_packed_supervised_rows_are_counted_otherwise(tmp_path: Path):
    """With sample_packing, a step of Axolotl's has more rows than its batch says, which is listed."""
    lines = axolotl(tmp_path, SUPERVISED + "sample_packing: true").left_out
    assert any(line.startswith("sample_packing: a row there is then as many as fit") for line in lines)


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
        axolotl(tmp_path, text)
    assert OTHER_SUPERVISED[added] in str(caught.value)


REFUSED = {  # a field → the key and the value that the schema refuses
    "lr_scheduler: rex": ("train", "schedule", "rex"),
    "optimizer: came_pytorch": ("train", "optimizer", "came_pytorch"),
    "max_grad_norm: 0": ("train", "max_grad_norm", 0),
    "{adapter: qlora, peft: {loftq_config: {loftq_bits: 4}}}": ("lora", "init", "loftq"),
    "dpo_loss_weights: [1, 2]": ("loss", "weights", [1, 2]),
    "eval_steps: 20": ("eval", "every", 20),
    "datasets: [{path: d, type: my.own}]": ("data", "format", "my.own"),
}


@pytest.mark.parametrize("added", REFUSED)
def test_what_the_schema_refuses_is_a_comment_with_its_reason(tmp_path: Path, added: str):
    """A line that the schema refuses is commented out and listed with its reason."""
    translation = axolotl(tmp_path, added)
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
    translation = axolotl(tmp_path, "adapter: qlora\nload_in_4bit: true\nsave_steps: 10")
    assert translation.refused == ()
    assert flat(tables(translation))["model.quantization"] == "nf4"
    assert flat(tables(translation))["output.save_every"] == 10
