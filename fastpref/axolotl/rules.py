"""The table of translations: which fields of Axolotl become which keys of fastpref, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fastpref.axolotl import method, rows, run
from fastpref.axolotl.source import METHODS, Axolotl, Made, Setting, dotted


@dataclass(frozen=True)
class Rule:
    """A rule that turns fields into keys. The documentation shows `how`."""

    fields: tuple[str, ...]
    keys: tuple[str, ...]
    make: Callable[[Axolotl], Made]
    how: str
    methods: tuple[str, ...] = METHODS


def _rule(fields: str, keys: str, make: Callable[[Axolotl], Made], how: str, *methods: str) -> Rule:
    return Rule(tuple(fields.split()), tuple(keys.split()), make, how, methods or METHODS)


def _same(
    field: str, key: str, read: Callable[[Axolotl, str], Any], how: str = "the same", methods: tuple[str, ...] = METHODS
) -> Rule:
    """Make the rule for a field that only has another name in fastpref."""

    def make(config: Axolotl) -> Made:
        if field in config:
            yield Setting(dotted(key), read(config, field), (field,))

    return Rule((field,), (key,), make, how, methods)


def _if_on(field: str, key: str, value: str, methods: tuple[str, ...] = METHODS) -> Rule:
    """Make the rule for a field that, if it is true, gives a key this value."""

    def make(config: Axolotl) -> Made:
        if config.on(field):
            yield Setting(dotted(key), value, (field,))

    return Rule((field,), (key,), make, f'"{value}"', methods)


def _every(field: str, key: str, per_epoch: str) -> Rule:
    how = "the same; a share below 1 is of `max_steps`; `*_per_epoch` is left out"
    return Rule((field, per_epoch), (key,), run.every(field, key, per_epoch), how)


RULES = (
    _same("base_model", "model.name", Axolotl.text),
    _rule("datasets", "data", lambda config: rows.entries(config, "datasets", ("data",)), "see below"),
    _rule("revision_of_model model_revision", "model.revision", method.revision, "the same"),
    _same("trust_remote_code", "model.trust_remote_code", Axolotl.on),
    _rule(
        "bf16 fp16 bfloat16 float16 float32", "model.dtype", method.dtype,
        "`bf16: true` bfloat16, `fp16: true` float16 with an `adapter`, all off float32; `bf16: auto` stays auto",
    ),
    _rule(
        "load_in_4bit load_in_8bit peft.backend peft.weight_dtype", "model.quantization", method.quantization,
        "nf4 (also for `adapter: qlora`), int8",
    ),
    Rule(method.LIGER, ("model.liger",), method.liger, "auto if any is true: what there is for the model"),
    Rule(
        ("adapter", *method.LORA, *method.TARGETS),
        ("lora", *(f"lora.{key}" for key, _ in method.LORA.values()), "lora.target"), method.lora,
        "the table where there is an `adapter`; `lora_target_linear` is all-linear, and goes before modules, which may "
        "be names or a regular expression",
    ),
    _same("rl", "loss.type", Axolotl.text, "the same; dpo, ipo, kto, orpo, simpo"),
    _rule(
        "trl.beta rl_beta dpo_beta orpo_alpha", "loss.beta", method.beta,
        "the first of them; SimPO without one has TRL's default, 0.1",
    ),
    _rule(
        "dpo_loss_type dpo_loss_weights dpo_norm_loss rpo_alpha dpo_label_smoothing dpo_use_weighting",
        "loss.variants loss.weights loss.label_smoothing loss.weighting", method.variants,
        "`rpo_alpha` adds the variant sft with that weight; `dpo_norm_loss` makes sigmoid sigmoid_norm", "dpo",
    ),
    _same("kto_desirable_weight", "loss.desirable_weight", Axolotl.number, methods=("kto",)),
    _same("kto_undesirable_weight", "loss.undesirable_weight", Axolotl.number, methods=("kto",)),
    _rule(
        "simpo_gamma cpo_alpha", "loss.gamma loss.sft_weight", method.simpo,
        "without them TRL's defaults, 0.5 and 1", "simpo",
    ),
    _rule("", "loss.nll_on", method.orpo, 'ORPO: "all", as TRL scores the prompt too', "orpo"),
    _if_on("precompute_ref_log_probs", "reference.mode", "precompute", ("dpo", "ipo", "kto")),
    _rule(
        "test_datasets val_set_size", "eval.data eval.fraction", run.held_out,
        "`test_datasets` as `datasets`; a `val_set_size` below 1 is the fraction",
    ),
    _every("eval_steps", "eval.every", "evals_per_epoch"),
    _rule(
        "generate_samples num_generation_samples generation_max_new_tokens", "eval.samples eval.sample_tokens",
        run.samples, "if `generate_samples` is on",
    ),
    _rule(
        "sequence_len max_prompt_len", "tokens.max_length tokens.max_prompt_length", run.length,
        "without it Axolotl's default, 512",
    ),
    _rule(
        "excess_length_strategy", "tokens.overlong", run.overlong,
        "`raise` is error; without it Axolotl's default, drop",
    ),
    _if_on("dataset_exact_deduplication", "tokens.duplicates", "drop"),
    _rule(
        "chat_template chat_template_jinja", "tokens.chat_template", run.template,
        "a known name, Jinja or a file; `tokenizer_default` is the default",
    ),
    _rule(
        "chat_template_kwargs", "tokens.chat_template_kwargs", run.keywords,
        "the same, without what is null; a keyword that the template does not read is an error of the run",
    ),
    _same("learning_rate", "train.learning_rate", Axolotl.number),
    _rule(
        "lr_scheduler warmup_steps warmup_ratio", "train.schedule train.warmup", run.schedule,
        "`constant_with_warmup` is constant, `constant` also has warmup 0; without a warm-up Axolotl's default, 0.03",
    ),
    _same("num_epochs", "train.epochs", Axolotl.number),
    _rule("max_steps", "train.steps", run.steps, "the same"),
    _rule(
        "gradient_accumulation_steps micro_batch_size batch_size", "train.batch train.tokens_per_microbatch", run.batch,
        "accumulation × micro-batch of one device; multiply it by the number of yours. Micro-batch × 2 completions × "
        "`sequence_len` tokens are computed at once",
    ),
    _rule(
        "optimizer", "train.optimizer", run.optimizer,
        "the kinds of AdamW: adamw, adamw_8bit, paged_adamw or paged_adamw_8bit",
    ),
    _same("weight_decay", "train.weight_decay", Axolotl.number),
    _same("max_grad_norm", "train.max_grad_norm", Axolotl.number),
    _rule(
        "gradient_checkpointing activation_offloading", "train.checkpointing train.offload_activations",
        run.checkpointing, "on or off; offload moves the inputs of layers to host memory",
    ),
    _same("seed", "train.seed", Axolotl.whole),
    _same("output_dir", "output.dir", Axolotl.text),
    _every("save_steps", "output.save_every", "saves_per_epoch"),
    _same("save_total_limit", "output.keep", Axolotl.whole),
    _same("hub_model_id", "output.push_to", Axolotl.text),
    _same("logging_steps", "log.every", Axolotl.whole),
    Rule(tuple(chain(*run.TRACKERS.values())), ("log.trackers",), run.trackers, "the trackers that are on"),
)  # fmt: skip
