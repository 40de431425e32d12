"""The names that other trainers (TRL, LLaMA-Factory, Axolotl, Unsloth, PEFT) give to keys of a config, for messages."""

_BATCH = "the rows of an optimizer step: micro-batch × accumulation × devices"
_OURS: dict[tuple[str, str], str] = {  # key, and words about it → the names of others
    ("[model]", ""): "base model_args model_config",
    ("model.name", ""): """
        base_model model_name_or_path model_name model_id pretrained_model_name_or_path tokenizer_name
        tokenizer_name_or_path""",
    ("model.revision", ""): "model_revision revision_of_model",
    ("model.dtype", 'such as "bfloat16"'): "bf16 fp16 pure_bf16 bfloat16 float16 float32 torch_dtype precision",
    ("model.quantization", '"nf4" (4 bits) or "int8"'): """
        load_in_4bit load_in_8bit quantization_bit quantization_method quantization_type quantization_config
        double_quantization bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_compute_dtype""",
    ("model.attention", ""): "attn_implementation flash_attn flash_attention use_flash_attention_2 sdp_attention",
    ("model.liger", ""): """
        use_liger_kernel enable_liger_kernel use_liger_loss liger_rope liger_rms_norm liger_rms_norm_gated
        liger_layer_norm liger_glu_activation liger_swiglu""",
    ("[lora]", "a table, which trains adapters"): """
        use_peft use_lora use_qlora adapter peft peft_config lora_config finetuning_type qlora""",
    ("lora.rank", ""): "r lora_r lora_rank",
    ("lora.alpha", ""): "lora_alpha",
    ("lora.dropout", ""): "lora_dropout disable_dropout",
    ("lora.target", ""): """
        lora_target lora_target_modules target_modules lora_target_linear lora_target_parameters target_parameters""",
    ("lora.exclude", ""): "exclude_modules",
    ("lora.layers", ""): "layers_to_transform peft_layers_to_transform",
    ("lora.modules_to_save", ""): "lora_modules_to_save additional_target",
    ("lora.init", ""): "init_lora_weights peft_init_lora_weights pissa_init pissa_iter loftq_config",
    ("lora.from", "the folder of an adapter"): "lora_model_dir adapter_name_or_path adapter_path adapter_file",
    ("lora.stack", ""): "create_new_adapter",
    ("lora.plus_ratio", ""): "loraplus_lr_ratio",
    ("lora.rslora", ""): "use_rslora peft_use_rslora",
    ("lora.dora", ""): "use_dora peft_use_dora",
    ("loss.type", ""): "rl stage loss_type method objective task",
    ("loss.beta", ""): "rl_beta dpo_beta kto_beta ipo_beta orpo_alpha orpo_beta simpo_beta pref_beta tau",
    ("loss.variants", ""): "dpo_loss_type pref_loss dpo_norm_loss",
    ("loss.weights", ""): "loss_weights dpo_loss_weights",
    ("loss.label_smoothing", ""): "dpo_label_smoothing label_smoothing_factor cdpo_epsilon",
    ("loss.f_divergence", ""): "f_divergence_type",
    ("loss.f_alpha", ""): "f_alpha_divergence_coef",
    ("loss.length_alpha", ""): "ld_alpha",
    ("loss.weighting", ""): "use_weighting dpo_use_weighting",
    ("loss.sft_weight", 'of simpo and cpo; of dpo it is variants = ["sigmoid", "sft"] with weights'): """
        cpo_alpha rpo_alpha pref_ftx""",
    ("loss.gamma", ""): "simpo_gamma",
    ("loss.desirable_weight", ""): "kto_desirable_weight kto_chosen_weight",
    ("loss.undesirable_weight", ""): "kto_undesirable_weight kto_rejected_weight",
    ("[[data]]", "a table for each source"): """
        datasets dataset dataset_name train_dataset train_data data_files pretraining_dataset dataset_path""",
    ("data.path", ""): "file file_name path_or_name data_path dataset_dir",
    ("data.name", ""): "dataset_config dataset_config_name subset",
    ("data.split", ""): "dataset_train_split train_split",
    ("data.rows", ""): "max_samples max_train_samples num_samples",
    ("[[eval.data]]", "or eval.fraction"): "test_datasets eval_dataset validation_data test_data dataset_test_split",
    ("eval.fraction", ""): "val_set_size val_size test_split_size validation_split eval_split_ratio",
    ("eval.every", ""): "eval_steps evals_per_epoch eval_strategy evaluation_strategy steps_per_eval",
    ("eval.samples", ""): "generate_samples num_generation_samples",
    ("eval.sample_tokens", ""): "generation_max_new_tokens max_new_tokens",
    ("tokens.max_length", ""): "cutoff_len sequence_len max_seq_length max_seq_len model_max_length",
    ("tokens.max_prompt_length", ""): "max_prompt_len",
    ("tokens.overlong", ""): "excess_length_strategy truncation_mode truncation",
    ("tokens.duplicates", '"drop"'): "dataset_exact_deduplication deduplicate",
    ("tokens.score", ""): "assistant_only_loss completion_only_loss train_on_inputs mask_history roles_to_train",
    ("tokens.chat_template", ""): "template chat_template_jinja chat_template_path",
    ("tokens.add", ""): "add_tokens add_special_tokens special_tokens additional_special_tokens",
    ("reference.name", ""): "ref_model ref_model_name_or_path reference_model ref_model_adapters",
    ("reference.quantization", ""): "ref_model_quantization_bit",
    ("reference.mode", '"precompute"'): "precompute_ref_log_probs precompute_ref_batch_size",
    ("reference.sync", "a table with every and mix"): """
        sync_ref_model ref_model_sync_steps ref_model_mixup_alpha""",
    ("[train]", ""): "training training_args training_arguments trainer",
    ("train.learning_rate", ""): "lr peak_lr max_lr",
    ("train.schedule", ""): "lr_scheduler lr_scheduler_type scheduler lr_schedule",
    ("train.schedule_options", ""): "lr_scheduler_kwargs",
    ("train.min_lr", ""): "cosine_min_lr_ratio min_learning_rate lr_min",
    ("train.warmup", "steps, or a share of them below 1"): "warmup_steps warmup_ratio num_warmup_steps",
    ("train.epochs", ""): "num_epochs num_train_epochs max_epochs",
    ("train.steps", ""): "max_steps num_steps iters total_steps",
    ("train.batch", _BATCH): """
        per_device_train_batch_size gradient_accumulation_steps micro_batch_size batch_size train_batch_size
        grad_accum gradient_accumulation""",
    ("train.tokens_per_microbatch", ""): "per_device_eval_batch_size eval_batch_size",
    ("train.layout", "rows share their prompts without padding by default"): """
        packing sample_packing neat_packing padding_free pad_to_sequence_len group_by_length""",
    ("train.freeze", "the parameters that are not trained"): """
        unfrozen_parameters freeze_trainable_layers freeze_trainable_modules freeze_extra_modules frozen_parameters""",
    ("train.neftune_alpha", ""): "neftune_noise_alpha noisy_embedding_alpha",
    ("train.optimizer", ""): "optim optimizer_type optimizer_name use_muon",
    ("train.betas", "both of them"): "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    ("train.epsilon", ""): "adam_epsilon eps adam_eps",
    ("train.max_grad_norm", ""): "gradient_clipping grad_clip clip_grad_norm gradient_clip_val",
    ("train.checkpointing", ""): """
        gradient_checkpointing use_gradient_checkpointing activation_checkpointing disable_gradient_checkpointing
        gradient_checkpointing_kwargs""",
    ("train.offload_activations", ""): "activation_offloading",
    ("train.seed", ""): "random_state random_seed data_seed",
    ("train.stop", "a table with after"): """
        early_stopping_patience early_stopping_steps metric_for_best_model load_best_model_at_end early_stopping""",
    ("output.dir", ""): "output_dir output_path save_dir out_dir",
    ("output.save_every", ""): "save_steps saves_per_epoch save_strategy checkpoint_every",
    ("output.keep", "checkpoints"): "save_total_limit",
    ("output.push_to", ""): "hub_model_id push_to_hub",
    ("log.every", ""): "logging_steps logging_strategy log_every",
    ("log.trackers", 'such as ["wandb"]'): """
        report_to use_wandb wandb_project use_mlflow mlflow_tracking_uri mlflow_experiment_name use_tensorboard
        use_comet comet_project_name use_trackio trackio_project_name""",
}
_BY_NAME = {name: key for key, names in _OURS.items() for name in names.split()}
KEYS = tuple(dict.fromkeys(key for key, _ in _OURS))
"""The keys and tables that the answers name."""


def answer(name: str) -> str | None:
    """Return what a key with another trainer's name is here, in words, or None for a name that no trainer has."""
    key, words = _BY_NAME.get(name.lower().replace("-", "_"), ("", ""))
    return f"here it is {key}{f', {words}' if words else ''}" if key else None
