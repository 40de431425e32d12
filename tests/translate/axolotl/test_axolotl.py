"""Translation of Axolotl's configs: whole configs, what is left out with its reason, paths, and mistakes."""

from pathlib import Path

import pytest

from fastpref.config import load_config
from fastpref.config.formats import options_of
from fastpref.errors import UserError
from fastpref.translate import DIALECTS, translate
from fastpref.translate.axolotl import rows
from tests.support.axolotl_configs import DPO, ENTRY_FIELDS, IPO, KTO_QLORA, ORPO, SIMPO
from tests.support.command_line import succeed
from tests.support.translations import axolotl, flat, tables

DIALECT = DIALECTS["--from-axolotl"]

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
    for line in translate(DIALECT, tmp_path / f"{name}-run.yml", tmp_path).left_out:
        assert f"\n  {line}\n" in output
        assert f"\n#   {line}\n" in written


# --- Nothing is lost silently ----------------------------------------------------------------------------------------


def test_every_key_of_a_table_of_data_is_translated_or_has_a_reason():
    """Every field of an entry of Axolotl's schema is translated or left out with a reason."""
    assert [field for field in ENTRY_FIELDS if (field in rows.KEYS) == (field in rows.LEFT_OUT)] == []


@pytest.mark.parametrize("field", sorted(set(rows.LEFT_OUT) | {"unheard_of"}))
def test_a_field_of_an_entry_without_a_counterpart_is_listed(tmp_path: Path, field: str):
    """A field of `datasets` without a counterpart is listed with the entry's number."""
    translation = axolotl(tmp_path, f"datasets: [{{path: d}}, {{path: e, {field}: x}}]")
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
    "special_tokens: {pad_token: x}": "special_tokens: pad_token: padding changes no result",
    "special_tokens: {eos_token: x}": "special_tokens: eos_token: the tokenizer keeps the tokens",
    "max_steps: 9\neval_strategy: epoch": "eval_strategy: max_steps decides the length of the run",
    "trl: {ref_model_sync_steps: 9}": "trl.ref_model_sync_steps: trl.sync_ref_model is not on",
    "cosine_min_lr_ratio: 0.1\nlr_scheduler: linear": "cosine_min_lr_ratio: lr_scheduler: linear does not read it",
    "unfrozen_parameters: ['model.embed_tokens.weight$[:32000]']": "unfrozen_parameters: rows of a parameter cannot",
    "adapter: lora\nunfrozen_parameters: [a]": "unfrozen_parameters: adapters are trained",
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
    lines = axolotl(tmp_path, added).left_out
    assert any(line.startswith(LEFT[added]) for line in lines), lines


def test_what_is_off_or_empty_is_not_listed(tmp_path: Path):
    """A field that is unset or off is not listed."""
    translation = axolotl(
        tmp_path, "deepspeed:\nfsdp: []\nflash_attention: false\nwandb_project: ''\ntokens:\nload_in_8bit: false"
    )
    assert translation.left_out == []
    assert flat(tables(translation)) == flat(tables(axolotl(tmp_path, "")))


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
    translation = axolotl(tmp_path, added, tmp_path / "out")
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
        axolotl(tmp_path, added)
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(MISTAKES[added])
    assert "\n" not in str(caught.value)


def test_the_options_of_chats_exist():
    """Every option of a chat format that the page names exists."""
    options = {how.split("`")[1].split(".")[1] for how in rows.KEYS.values() if how.startswith("`format.")}
    assert options <= set(options_of("chat_template.default"))
