"""Translation of LLaMA-Factory's configs: single fields, data sets, whole configs, and what is left out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpref.config import Config, load_config
from fastpref.errors import UserError
from fastpref.translate import translate
from tests.support.command_line import succeed
from tests.support.translations import TRAINERS, expected, flat, snippet, tables, taken, wanted

FACTORY = TRAINERS["LLaMA-Factory"]
SMALLEST = flat(
    {  # the translation of the smallest config: LLaMA-Factory's defaults
        "model": {"name": "m"},
        "lora": {"rank": 8, "alpha": 16},
        "loss": {"type": "dpo"},
        "data": [{"path": "d"}],
        "tokens": {"max_length": 2048},
        "train": {
            "learning_rate": 5e-5, "schedule": "linear", "warmup": 0, "epochs": 3.0, "batch": 8,
            "tokens_per_microbatch": 8 * 2 * 2048,
        },
        "output": {"save_every": 500},
        "log": {"every": 500},
    }
)  # fmt: skip
FULL = {"lora.rank": None, "lora.alpha": None}
# LLaMA-Factory's fields → what they add to or change in the smallest config.
TABLE: dict[str, dict[str, Any]] = {
    "{}": {},
    "model_revision: v1": {"model.revision": "v1"},
    "trust_remote_code: true": {"model.trust_remote_code": True},
    "bf16: true": {"model.dtype": "bfloat16"},
    "pure_bf16: true": {"model.dtype": "bfloat16"},
    "fp16: true": {"model.dtype": "float16"},
    "{fp16: true, finetuning_type: full}": FULL,
    "{bf16: true, finetuning_type: full}": {"model.dtype": "bfloat16", **FULL},
    "quantization_bit: 4": {"model.quantization": "nf4"},
    "quantization_bit: 8": {"model.quantization": "int8"},
    "enable_liger_kernel: true": {"model.liger": "auto"},
    "finetuning_type: full": FULL,
    "lora_rank: 32": {"lora": {"rank": 32, "alpha": 64}},
    "{lora_rank: 32, lora_alpha: 16}": {"lora": {"rank": 32, "alpha": 16}},
    "lora_target: all": {"lora": {"rank": 8, "alpha": 16, "target": "all-linear"}},
    "lora_target: 'q_proj, v_proj'": {"lora": {"rank": 8, "alpha": 16, "target": ["q_proj", "v_proj"]}},
    "{additional_target: 'embed_tokens,lm_head', use_rslora: true, use_dora: true}": {
        "lora": {"rank": 8, "alpha": 16, "modules_to_save": ["embed_tokens", "lm_head"], "rslora": True, "dora": True},
    },
    "pref_beta: 0.3": {"loss.beta": 0.3},
    "pref_loss: sigmoid": {},
    "pref_loss: hinge": {"loss.variants": ["hinge"]},
    "pref_loss: ipo": {"loss.variants": ["ipo"]},
    "pref_loss: orpo": {"loss.type": "orpo"},
    "pref_loss: simpo": {"loss": {"type": "simpo", "beta": 0.1, "gamma": 0.5}},
    "{pref_loss: simpo, simpo_gamma: 1.5, pref_beta: 2.0, pref_ftx: 0.1}": {
        "loss": {"type": "simpo", "beta": 2.0, "gamma": 1.5, "sft_weight": 0.1},
    },
    "pref_ftx: 0.5": {"loss": {"type": "dpo", "variants": ["sigmoid", "sft"], "weights": [1.0, 0.5]}},
    "dpo_label_smoothing: 0.1": {"loss.label_smoothing": 0.1},
    "ld_alpha: 0.5": {"loss.length_alpha": 0.5},
    "{stage: kto, kto_chosen_weight: 0.5, kto_rejected_weight: 2}": {
        "loss": {"type": "kto", "desirable_weight": 0.5, "undesirable_weight": 2},
    },
    "max_samples: 100": {"data": [{"path": "d", "rows": 100}]},
    "dataset: 'a, b'": {"data": [{"path": "a"}, {"path": "b"}]},
    "dataset: [a, b]": {"data": [{"path": "a"}, {"path": "b"}]},
    "val_size: 0.1": {"eval.fraction": 0.1},
    "{val_size: 0.1, eval_strategy: steps, eval_steps: 20}": {"eval": {"fraction": 0.1, "every": 20}},
    "{eval_dataset: e, max_samples: 9}": {"data.0.rows": 9, "eval.data": [{"path": "e", "rows": 9}]},
    "cutoff_len: 300": {"tokens.max_length": 300, "train.tokens_per_microbatch": 4800},
    "template: llama3": {"tokens.chat_template": "llama3"},
    "template: default": {},
    "{per_device_train_batch_size: 1, gradient_accumulation_steps: 8}": {
        "train.batch": 8, "train.tokens_per_microbatch": 4096,
    },
    "disable_gradient_checkpointing: true": {"train.checkpointing": False},
    "{lr_scheduler_type: cosine, warmup_ratio: 0.1}": {"train.schedule": "cosine", "train.warmup": 0.1},
    "learning_rate: 1e-4": {"train.learning_rate": 1e-4},
    "{logging_steps: 10, save_steps: 100}": {"log.every": 10, "output.save_every": 100},
    "report_to: none": {},
}  # fmt: skip


@pytest.mark.parametrize("added", TABLE)
def test_fields_become_these_keys(tmp_path: Path, added: str):
    """A snippet adds exactly these keys to LLaMA-Factory's defaults, and the result loads."""
    translation = snippet(FACTORY, tmp_path, added)
    assert flat(tables(translation)) == expected(SMALLEST, TABLE[added])
    Config.model_validate(tables(translation))


MORE: dict[str, dict[str, Any]] = {  # fields → keys, and None for keys that are not there
    "adapter_name_or_path: a": {"lora.from": "a", "lora.stack": None, "reference.adapter": "none", "lora.rank": None},
    "{adapter_name_or_path: a, create_new_adapter: true, lora_rank: 4}": {
        "lora.from": "a", "lora.stack": True, "reference.adapter": "start", "lora.rank": 4,
    },
    "{adapter_name_or_path: a, ref_model: r}": {
        "lora.from": "a",
        "reference.adapter": None,
        "reference.name": "r",
        "reference.quantization": None,
    },
    "{quantization_bit: 4, ref_model: r}": {"reference.name": "r", "reference.quantization": "none"},
    "{adapter_name_or_path: a, pref_loss: simpo}": {"lora.from": "a", "reference.adapter": None},
    "{ref_model: r, ref_model_quantization_bit: 4}": {"reference.name": "r", "reference.quantization": "nf4"},
    "{ref_model: m, ref_model_adapters: b}": {"reference.name": "b", "reference.quantization": None},
    "pissa_init: true": {"lora.init": "pissa_niter_16"},
    "{pissa_init: true, pissa_iter: -1}": {"lora.init": "pissa"},
    "loraplus_lr_ratio: 16": {"lora.plus_ratio": 16},
    "use_muon: true": {"train.optimizer": "muon"},
    "{add_tokens: '<a>,<b>', add_special_tokens: '<c>'}": {"tokens.add": ["<a>", "<b>", "<c>"]},
    "{val_size: 0.1, eval_strategy: steps, early_stopping_steps: 3, metric_for_best_model: eval_loss}": {
        "train.stop": {"after": 3, "metric": "eval/loss"},
    },
    "{val_size: 0.1, eval_strategy: steps, early_stopping_steps: 2}": {
        "train.stop": {"after": 2, "metric": "eval/loss"},
    },
    "{eval_strategy: epoch, val_size: 0.1, num_train_epochs: 2}": {"eval.every": 0.5},
    "{finetuning_type: freeze, freeze_trainable_layers: -1, freeze_extra_modules: lm_head}": {
        "lora.rank": None, "train.freeze": [r"(?!.*(?:(?:\.0\.)|(?:lm_head))).*\.(?:weight|bias)"],
    },
    "neftune_noise_alpha: 5": {"train.neftune_alpha": 5},
}  # fmt: skip


@pytest.mark.parametrize("added", MORE)
def test_fields_become_these_keys_too(tmp_path: Path, added: str):
    """A snippet gives these keys, which the schema takes."""
    assert taken(snippet(FACTORY, tmp_path, added), MORE[added]) == MORE[added]


LEFT = {
    "dataset: d": "dataset: data/dataset_info.json is not here, so d is taken for the path",
    "template: qwen": "template: qwen: the tokenizer's own chat template is used",
    "quantization_bit: 3": "quantization_bit: 3 bits are not known",
    "{quantization_bit: 4, quantization_type: fp4}": "quantization_type: fp4 is not known",
    "{quantization_bit: 4, quantization_method: hqq}": "quantization_method: hqq: quantised weights are",
    "{quantization_bit: 4, double_quantization: false}": "double_quantization: nf4 always has",
    "{finetuning_type: full, lora_rank: 8}": "lora_rank: finetuning_type: full",
    "lora_dropout: 0.1": "lora_dropout: LLaMA-Factory turns all dropout off",
    "{adapter_name_or_path: a, lora_rank: 4}": "lora_rank: the adapter of adapter_name_or_path has its own",
    "create_new_adapter: true": "create_new_adapter: there is no adapter_name_or_path",
    "ref_model_quantization_bit: 4": "ref_model_quantization_bit: there is no ref_model",
    "{pref_loss: orpo, ref_model: r}": "ref_model: means nothing to pref_loss: orpo",
    "{pref_loss: orpo, pref_ftx: 0.1}": "pref_ftx: ORPO has no further supervised term",
    "{stage: kto, pref_loss: sigmoid}": "pref_loss: means nothing to stage: kto",
    "pref_bco_weight: 0.25": 'pref_bco_weight: it compares rewards with their running mean, which no loss here does; '
    'the nearest is loss.variants = ["sigmoid", "bco_pair"] with loss.weights = [0.8, 0.2]',
    "kto_chosen_weight: 2": "kto_chosen_weight: means nothing to pref_loss: sigmoid",
    "{pref_loss: ipo, dpo_label_smoothing: 0.1}": "dpo_label_smoothing: would be loss.label_smoothing = 0.1: ",
    "use_galore: true": 'use_galore: would be train.optimizer = "galore": ',
    "val_size: 100": "val_size: a number of rows cannot be held out",
    "load_best_model_at_end: true": "load_best_model_at_end: final/ is the last model",
    "freeze_trainable_layers: 4": "freeze_trainable_layers: finetuning_type: lora",
    "pissa_iter: 4": "pissa_iter: pissa_init is not on",
    "packing: true": "packing: rows are packed without padding",
    "{stage: sft, neat_packing: true}": "neat_packing: a row there is then as many as fit its length",
    "mix_strategy: interleave_over": "mix_strategy: data sets are concatenated",
}  # fmt: skip


@pytest.mark.parametrize("added", LEFT)
def test_what_is_lost_is_said(tmp_path: Path, added: str):
    """Each loss of information has a line with the field and the reason."""
    lines = snippet(FACTORY, tmp_path, added).left_out
    assert any(line.startswith(LEFT[added]) for line in lines), lines


MISTAKES = {
    "stage: ppo": "stage: ppo: generates while it trains; fastpref trains stage: dpo, kto and sft",
    "stage: rm": "stage: rm: trains a reward model",
    "stage: pt": "stage: pt: trains on plain texts",
    "stage: grpo": "stage: grpo: this stage is not known here",
    "pref_loss: kto_pair": "pref_loss: kto_pair: fastpref has no KTO of pairs; stage: kto takes single rows",
    "pref_loss: odd": "pref_loss: odd: fastpref trains pref_loss: sigmoid, hinge, ipo, orpo, simpo",
    "finetuning_type: freeze": "finetuning_type: freeze: the last 2 layers are trained, and how many the model has",
    "{finetuning_type: freeze, use_llama_pro: true}": "use_llama_pro: the layers that were added",
    "finetuning_type: oft": "finetuning_type: oft: fastpref trains lora, full and freeze",
    "adapter_name_or_path: 'a,b'": "adapter_name_or_path: 2 adapters; merge all but one into the model",
    "{finetuning_type: full, adapter_name_or_path: a}": "adapter_name_or_path: finetuning_type: full has no adapter",
    "{ref_model: r, ref_model_adapters: b}": "ref_model_adapters: a reference is a model, or one adapter",
    "{ref_model: r, ref_model_quantization_bit: 3}": "ref_model_quantization_bit: must be 4 or 8, got 3",
    "{val_size: 0.1, eval_dataset: e}": "val_size: eval_dataset is held out already",
    "dataset: null": "there is no dataset: in it; add the names of data sets",
    "dataset: 3": "dataset: must be names, got 3",
    "lora_rank: big": 'lora_rank: must be a number, got "big"',
}


@pytest.mark.parametrize("added", MISTAKES)
def test_a_mistake_is_one_message(tmp_path: Path, added: str):
    """A mistake gives one line with the file and the field; what cannot be trained here is refused."""
    with pytest.raises(UserError) as caught:
        snippet(FACTORY, tmp_path, added)
    assert str(caught.value).split("cfg.yml: ", 1)[1].startswith(MISTAKES[added])
    assert "\n" not in str(caught.value)


def test_the_last_layers_are_those_of_the_model(tmp_path: Path):
    """With finetuning_type: freeze all weights are frozen but those of the last layers, whose number is looked up."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 12}))
    added = f"{{finetuning_type: freeze, freeze_trainable_modules: mlp, model_name_or_path: {tmp_path}/model}}"
    (pattern,) = wanted(snippet(FACTORY, tmp_path, added))["train.freeze"]
    frozen = {"model.embed_tokens.weight": True, "model.layers.1.mlp.up_proj.weight": True,
              "model.layers.11.self_attn.q_proj.bias": True, "model.layers.11.mlp.up_proj.weight": False,
              "model.layers.10.mlp.down_proj.weight": False, "model.layers.10.mlp": False, "model": False}  # fmt: skip
    assert {name: re.fullmatch(pattern, name) is not None for name in frozen} == frozen


# --- Whole configs ---------------------------------------------------------------------------------------------------

WHOLE = """
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid  # choices: [sigmoid (dpo), orpo, simpo]

### dataset
dataset: pairs
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16

### output
output_dir: saves/llama3-8b/lora/dpo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""


def test_a_whole_config_is_written_and_checked(described: Path):
    """`init --from-llamafactory` then `check` succeed with these values; what is left out is said in both places."""
    (described / "run.yaml").write_text(WHOLE)
    row = {"instruction": "q", "input": "", "chosen": "yes", "rejected": "no"}
    (described / "data" / "pairs.json").write_text(json.dumps([row]))
    output = succeed("init", "--from-llamafactory", "run.yaml", "--output", "data/run.toml").out
    succeed("check", "data/run.toml")
    written = (described / "data" / "run.toml").read_text()
    config = load_config(described / "data" / "run.toml")
    assert config.data[0].path == str(described / "data" / "pairs.json")
    got = flat(config.model_dump(mode="json"))
    values = {"loss.type": "dpo", "train.batch": 8, "train.warmup": 0.1, "data.0.rows": 1000, "lora.alpha": 16.0}
    assert {key: got[key] for key in values} == values
    for line in translate(FACTORY.dialect, described / "run.yaml", described / "data").left_out:
        assert f"\n  {line}\n" in output
        assert f"\n#   {line}\n" in written


def test_relative_paths_keep_their_meaning(described: Path, monkeypatch: pytest.MonkeyPatch):
    """Paths of models and adapters that LLaMA-Factory finds from here are found by a config in another folder."""
    for name in ("model", "adapter", "other"):
        (described / name).mkdir()
    added = "{model_name_or_path: ./model, adapter_name_or_path: adapter, ref_model: other, dataset: pairs}"
    translation = snippet(FACTORY, described, added, described / "out")
    (described / "out").mkdir()
    (described / "out" / "c.toml").write_text(translation.text)
    monkeypatch.chdir("/")
    config = load_config(described / "out" / "c.toml")
    assert config.lora is not None
    found = (config.model.name, config.lora.start, config.reference.name, config.data[0].path)
    assert found == tuple(str(described / name) for name in ("model", "adapter", "other", "data/pairs.json"))


def test_a_config_without_a_stage_is_supervised(tmp_path: Path):
    """LLaMA-Factory's default stage is sft, in which the dropout of adapters counts."""
    raw = {"model_name_or_path": "m", "dataset": "d", "template": "llama3", "lora_dropout": 0.1, "pref_beta": 0.2}
    (tmp_path / "cfg.yml").write_text(yaml.safe_dump(raw))
    translation = translate(FACTORY.dialect, tmp_path / "cfg.yml", tmp_path)
    got = wanted(translation)
    assert (got["loss.type"], got["lora.dropout"]) == ("sft", 0.1)
    assert "pref_beta: means nothing to stage: sft" in translation.left_out
