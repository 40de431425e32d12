"""The table of translations: which fields of TRL become which keys of fastpref, and how."""

from fastpref.translate.fields import Fields
from fastpref.translate.rule import Rule, rule, same
from fastpref.translate.trainer_arguments import checkpointing, evaluations, rules
from fastpref.translate.trl import method, rows, run

RULES = (
    same("model_name_or_path", "model.name", Fields.text),
    rule(
        "dataset_name dataset_config dataset_train_split datasets", "data", rows.train,
        "a [[data]] of `dataset_name`, or one an entry of `datasets`, see below",
    ),
    same("model_revision", "model.revision", Fields.text),
    same("trust_remote_code", "model.trust_remote_code", Fields.on),
    rule(
        "dtype bf16 fp16", "model.dtype", method.dtype,
        "half precision, if `dtype` or with adapters `bf16` or `fp16` asks for it; float32 if both are off; TRL's "
        "default, float32 weights and products in bfloat16, is auto",
    ),
    rule(
        "load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant", "model.quantization",
        method.quantization, "nf4, int8",
    ),
    Rule(
        method.LORA_FIELDS, method.LORA_KEYS, method.lora,
        "the table if `use_peft` is on; without `lora_target_modules` PEFT's default for the architecture; "
        "`lora_dropout` (0.05) if `disable_dropout` is off, and in `trl sft`",
    ),
    rule("", "loss.type", method.loss, "`--loss`, or what the fields show, or dpo"),
    same("beta", "loss.beta", Fields.number, methods=("dpo", "kto")),
    rule("loss_type loss_weights label_smoothing", "loss.variants loss.weights loss.label_smoothing", method.dpo,
         "the same; TRL smooths the labels of robust, exo_pair and aot only", "dpo"),
    rule("f_divergence_type f_alpha_divergence_coef", "loss.f_divergence loss.f_alpha", method.divergence,
         "the same, without `_divergence`", "dpo"),
    same("ld_alpha", "loss.length_alpha", Fields.number, methods=("dpo",)),
    same("use_weighting", "loss.weighting", Fields.on, methods=("dpo",)),
    same("discopop_tau", "loss.discopop_tau", Fields.number, methods=("dpo",)),
    rule("loss_type", "loss.kl", method.kto, '`trl kto`: apo_zero_unpaired is "none"', "kto"),
    same("desirable_weight", "loss.desirable_weight", Fields.number, methods=("kto",)),
    same("undesirable_weight", "loss.undesirable_weight", Fields.number, methods=("kto",)),
    rule("loss_type completion_only_loss assistant_only_loss", "loss.type", method.sft,
         "`trl sft`: the completions, or the assistant's turns", "sft"),
    rule("precompute_ref_log_probs", "reference.mode", method.reference, '"precompute"', "dpo", "kto"),
    rule(" ".join(method.SYNC), "reference.sync", method.sync,
         "every `ref_model_sync_steps` (512), mixed by `ref_model_mixup_alpha` (0.6)", "dpo", "kto"),
    rule("dataset_test_split test_split_size", "eval.data eval.fraction", rows.held_out,
         "if `eval_strategy` is not `no`, the split of `dataset_name`; a `test_split_size` below 1 is the fraction"),
    evaluations(10),
    rule("max_length truncation_mode", "tokens.max_length", run.length, f"without it {run.LENGTH}"),
    rule("", "tokens.score", run.score, '"all", as TRL scores every turn of a completion', "dpo", "kto"),
    rule("chat_template_path", "tokens.chat_template", run.template, "a file", "sft"),
    rule("per_device_train_batch_size gradient_accumulation_steps", "train.batch train.tokens_per_microbatch",
         run.batch, "their product, by default 8 × 1, on one device; multiply it by the number of yours. A micro-batch "
         "× 2 completions (`trl sft`: 1) × `max_length` tokens are computed at once"),
    rule("gradient_checkpointing activation_checkpointing activation_offloading",
         "train.checkpointing train.offload_activations",
         checkpointing(("gradient_checkpointing", "activation_checkpointing"), "activation_offloading"),
         "on or off; without them auto, which changes no result"),
    *rules({"dpo": 1e-6, "kto": 1e-6, "sft": 2e-5}, 10),
)  # fmt: skip
