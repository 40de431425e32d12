"""The table of translations: which fields of LLaMA-Factory become which keys of fastpref, and how."""

from dataclasses import replace

from fastpref.translate.fields import Fields
from fastpref.translate.llamafactory import method, rows, run
from fastpref.translate.rule import Rule, if_on, rule, same, with_default
from fastpref.translate.trainer_arguments import evaluations, rules

RULES = (
    same("model_name_or_path", "model.name", Fields.text),
    rule("dataset dataset_dir max_samples", "data", rows.train,
         "a [[data]] each, as `dataset_info.json` in `dataset_dir` describes it, see below"),
    same("model_revision", "model.revision", Fields.text),
    same("trust_remote_code", "model.trust_remote_code", Fields.on),
    rule("bf16 fp16 pure_bf16", "model.dtype", method.dtype, "bfloat16 or float16, if one is on"),
    rule("quantization_bit quantization_type quantization_method double_quantization", "model.quantization",
         method.quantization, "4 is nf4, 8 is int8"),
    if_on("enable_liger_kernel", "model.liger", "auto"),
    Rule(
        method.LORA_FIELDS, method.LORA_KEYS, method.lora,
        "the table unless `finetuning_type` is full; rank 8, alpha twice the rank; `all` is all-linear; `lora_dropout` "
        "counts in the stage sft only; `pissa_iter` n is pissa_niter_n. An adapter is trained on, with the bare model "
        "as the reference, or a new one on top of it, with the merged one as the reference",
    ),
    Rule(method.REFERENCE, ("reference.name", "reference.quantization"), method.reference,
         "the model, or the adapter of the trained model; its bits", ("dpo", "kto")),
    rule("stage pref_loss pref_ftx", "loss.type loss.variants loss.weights loss.sft_weight", method.loss,
         "dpo with sigmoid, hinge or ipo as the variant, orpo, simpo, kto, sft; `pref_ftx` adds the variant sft, or is "
         "SimPO's sft_weight"),
    rule("pref_beta", "loss.beta", method.beta, "the same; SimPO without one has 0.1", "dpo", "orpo", "simpo", "kto"),
    rule("simpo_gamma", "loss.gamma", method.simpo, "the same; without it 0.5", "simpo"),
    rule("dpo_label_smoothing", "loss.label_smoothing", method.smoothing, "the same", "dpo"),
    rule("ld_alpha", "loss.length_alpha", method.lengths, "the same, for the reference too", "dpo"),
    rule("pref_bco_weight", "", method.classifier, "left out: rewards are compared with a running mean", "dpo"),
    same("kto_chosen_weight", "loss.desirable_weight", Fields.number, methods=("kto",)),
    same("kto_rejected_weight", "loss.undesirable_weight", Fields.number, methods=("kto",)),
    rule("eval_dataset val_size", "eval.data eval.fraction", rows.held_out,
         "as `dataset`; a `val_size` below 1 is the fraction"),
    evaluations(500),
    with_default("cutoff_len", "tokens.max_length", Fields.whole, run.LENGTH),
    rule("template", "tokens.chat_template", run.template,
         f"{', '.join(f'`{name}`' for name in run.SAME)}; with others the tokenizer's own is used"),
    rule("add_tokens add_special_tokens", "tokens.add", run.new_tokens, "the same"),
    rule("per_device_train_batch_size gradient_accumulation_steps", "train.batch train.tokens_per_microbatch",
         run.batch, "their product, by default 8 × 1, on one device; multiply it by the number of yours. A micro-batch "
         "× 2 completions (sft: 1) × `cutoff_len` tokens are computed at once"),
    rule("disable_gradient_checkpointing", "train.checkpointing", run.checkpointing, "false; without it auto"),
    Rule(run.STOP, ("train.stop",), run.stop, "after so many evaluations that are not better"),
    *(
        replace(one, fields=(*run.OTHERS, "optim"), make=run.optimizer, how=f"{one.how}; `use_muon` is muon")
        if one.fields == ("optim",) else one
        for one in rules(dict.fromkeys(("dpo", "kto", "sft"), 5e-5), 500)
    ),
)  # fmt: skip
