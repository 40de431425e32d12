"""The table of translations: which fields of Axolotl become which keys of fastpref, and how."""

from itertools import chain

from fastpref.translate.axolotl import method, rows, run
from fastpref.translate.fields import Fields
from fastpref.translate.rule import Rule, if_on, rule, same
from fastpref.translate.trainer_arguments import betas, optimizer, steps

SHARES = "steps; a share below 1 is of all steps; a strategy of epochs is 1 / `num_epochs` of them"

RULES = (
    same("base_model", "model.name", Fields.text),
    rule("datasets", "data", lambda config: rows.entries(config, "datasets", ("data",)), "see below"),
    rule("revision_of_model model_revision", "model.revision", method.revision, "the same"),
    same("trust_remote_code", "model.trust_remote_code", Fields.on),
    rule(
        "bf16 fp16 bfloat16 float16 float32", "model.dtype", method.dtype,
        "`bf16: true` bfloat16, `fp16: true` float16 with an `adapter`, all off float32; `bf16: auto` stays auto",
    ),
    rule(
        "load_in_4bit load_in_8bit peft.backend peft.weight_dtype", "model.quantization", method.quantization,
        "nf4 (also for `adapter: qlora`), int8",
    ),
    Rule(method.LIGER, ("model.liger",), method.liger, "auto if any is true: what there is for the model"),
    Rule(
        method.LORA_FIELDS, method.LORA_KEYS, method.lora,
        "the table where there is an `adapter`; `lora_target_linear` is all-linear, and goes before modules, which may "
        "be names or a regular expression. The adapter of `lora_model_dir` has its own rank, alpha and targets. "
        "`lora_dropout` counts in supervised training only. `loftq_bits: 4` is loftq",
    ),
    rule("rl", "loss.type", method.loss, "the same; dpo, ipo, kto, orpo, simpo; without it sft, see below"),
    rule(
        "trl.beta rl_beta dpo_beta orpo_alpha", "loss.beta", method.beta,
        "the first of them; SimPO without one has TRL's default, 0.1",
    ),
    rule(
        "dpo_loss_type dpo_loss_weights dpo_norm_loss rpo_alpha dpo_label_smoothing dpo_use_weighting",
        "loss.variants loss.weights loss.label_smoothing loss.weighting", method.variants,
        "`rpo_alpha` adds the variant sft with that weight; `dpo_norm_loss` makes sigmoid sigmoid_norm", "dpo",
    ),
    rule(
        "kto_desirable_weight", "loss.desirable_weight",
        method.kto_weight("kto_desirable_weight", "loss.desirable_weight"), "the same; 0 is 1, as in Axolotl", "kto",
    ),
    rule(
        "kto_undesirable_weight", "loss.undesirable_weight",
        method.kto_weight("kto_undesirable_weight", "loss.undesirable_weight"), "the same; 0 is 1, as in Axolotl",
        "kto",
    ),
    rule(
        "simpo_gamma cpo_alpha", "loss.gamma loss.sft_weight", method.simpo,
        "without them TRL's defaults, 0.5 and 1", "simpo",
    ),
    rule("", "loss.nll_on", method.orpo, 'ORPO: "all", as TRL scores the prompt too', "orpo"),
    if_on("precompute_ref_log_probs", "reference.mode", "precompute", ("dpo", "ipo", "kto")),
    rule(
        " ".join(method.SYNC), "reference.sync", method.sync,
        "every `ref_model_sync_steps` (64), mixed by `ref_model_mixup_alpha` (0.9)", "dpo", "ipo", "kto",
    ),
    rule(
        "test_datasets val_set_size", "eval.data eval.fraction", run.held_out,
        "`test_datasets` as `datasets`; a `val_set_size` below 1 is the fraction",
    ),
    rule(
        "eval_steps evals_per_epoch eval_strategy", "eval.every", run.evaluations,
        f"{SHARES}; n times in each epoch is 1 / (n × `num_epochs`)",
    ),
    rule(
        "generate_samples num_generation_samples generation_max_new_tokens", "eval.samples eval.sample_tokens",
        run.samples, "if `generate_samples` is on",
    ),
    rule(
        "sequence_len max_prompt_len", "tokens.max_length tokens.max_prompt_length", run.length,
        "without it Axolotl's default, 512",
    ),
    rule(
        "excess_length_strategy", "tokens.overlong", run.overlong,
        "`raise` is error; without it Axolotl's default, drop",
    ),
    if_on("dataset_exact_deduplication", "tokens.duplicates", "drop"),
    rule(
        "chat_template chat_template_jinja", "tokens.chat_template", run.template,
        "a known name, Jinja or a file; `tokenizer_default` is the default",
    ),
    rule(
        "tokens special_tokens", "tokens.add", run.new_tokens,
        "`tokens` and the `additional_special_tokens`; other special tokens are left out",
    ),
    rule(
        "chat_template_kwargs", "tokens.chat_template_kwargs", run.keywords,
        "the same, without what is null; a keyword that the template does not read is an error of the run",
    ),
    same("learning_rate", "train.learning_rate", Fields.number),
    rule(
        "lr_scheduler lr_scheduler_kwargs cosine_min_lr_ratio warmup_steps warmup_ratio",
        "train.schedule train.schedule_options train.min_lr train.warmup", run.schedule,
        "`constant_with_warmup` is constant, `constant` also has warmup 0; without a warm-up Axolotl's default, 0.03",
    ),
    same("num_epochs", "train.epochs", Fields.number),
    rule("max_steps", "train.steps", steps, "the same"),
    rule(
        "gradient_accumulation_steps micro_batch_size batch_size", "train.batch train.tokens_per_microbatch", run.batch,
        "accumulation × micro-batch of one device; multiply it by the number of yours. Micro-batch × 2 completions × "
        "`sequence_len` tokens are computed at once",
    ),
    rule("optimizer", "train.optimizer", optimizer("optimizer"), "by its name; the kinds of AdamW by four names"),
    rule("adam_beta1 adam_beta2", "train.betas", betas("optimizer"), "both, if one of them is there, or for Lion"),
    same("adam_epsilon", "train.epsilon", Fields.number),
    rule(
        "neftune_noise_alpha noisy_embedding_alpha", "train.neftune_alpha", run.neftune,
        "the same; Axolotl applies it in supervised training only",
    ),
    rule(
        "early_stopping_patience metric_for_best_model load_best_model_at_end", "train.stop", run.stop,
        "after so many evaluations that are not better; Axolotl stops supervised training only",
    ),
    same("weight_decay", "train.weight_decay", Fields.number),
    same("max_grad_norm", "train.max_grad_norm", Fields.number),
    rule(
        "gradient_checkpointing activation_offloading", "train.checkpointing train.offload_activations",
        run.checkpointing, "on or off; offload moves the inputs of layers to host memory",
    ),
    same("seed", "train.seed", Fields.whole),
    same("output_dir", "output.dir", Fields.text),
    rule(
        "save_steps saves_per_epoch save_strategy save_total_limit", "output.save_every output.keep", run.checkpoints,
        "as `eval.every`; without them every epoch, and the last 4 are kept",
    ),
    same("hub_model_id", "output.push_to", Fields.text),
    same("logging_steps", "log.every", Fields.whole),
    Rule(tuple(chain(*run.TRACKERS.values())), ("log.trackers",), run.trackers, "the trackers that are on"),
)  # fmt: skip
