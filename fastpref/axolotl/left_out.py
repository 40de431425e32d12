"""Axolotl's fields without a counterpart, by the reason."""

_BY_REASON: dict[str, str] = {
    "rows are always packed without padding, which changes no result": """
        sample_packing sample_packing_group_size sample_packing_bin_size sample_packing_sequentially
        sample_packing_mp_start_method sample_packing_eff_est eval_sample_packing pad_to_sequence_len
        pad_to_multiple_of batch_flattening multipack_real_batches dpo_padding_free group_by_length""",
    "fastpref trains on one GPU; to keep the batch, multiply train.batch by the number of yours": """
        deepspeed deepcompile fsdp fsdp_config fsdp_version fsdp_final_state_dict_type ddp ddp_timeout
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters world_size local_rank device_map max_memory
        dp_shard_size dp_replicate_size sequence_parallel_degree context_parallel_size heads_k_stride ring_attn_func
        tensor_parallel_size qlora_sharded_model_loading accelerator_config use_ray ray_run_name ray_num_workers
        resources_per_worker experimental_skip_move_to_device device gpu_memory_limit""",
    "attention is chosen for the model and the device": """
        flash_attention flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp
        flash_optimum sdp_attention s2_attention xformers_attention flex_attention flex_attn_compile_kwargs
        eager_attention sage_attention attn_implementation gemma4_hybrid_attn_impl scaling_softmax
        scaling_softmax_factor scaling_softmax_bias""",
    "the head is always fused with the loss, and the logits never held": """
        dpo_use_liger_kernel dpo_use_logits_to_keep liger_cross_entropy liger_fused_linear_cross_entropy
        liger_use_token_scaling chunked_cross_entropy chunked_cross_entropy_num_chunks unsloth_cross_entropy_loss
        cut_cross_entropy""",
    "there are no such kernels here": """
        lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel unsloth_lora_mlp unsloth_lora_qkv
        unsloth_lora_o unsloth_rms_norm unsloth_rope use_kernels tiled_mlp tiled_mlp_num_shards
        tiled_mlp_use_original_mlp torch_compile torch_compile_backend torch_compile_mode experts_implementation""",
    "columns are read as they are, none is removed": "remove_unused_columns",
    "data are read as they are needed, without processes, shards or a prepared copy": """
        dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataset_shard_num
        dataset_shard_idx skip_prepare_dataset num_dataset_shards_to_save streaming streaming_multipack_buffer_size
        dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor dataloader_drop_last
        push_dataset_to_hub is_preprocess preprocess_iterable preprocess_shards gc_steps""",
    "rows are shuffled anew in every epoch, by train.seed": """
        shuffle_merged_datasets shuffle_before_merging_datasets curriculum_sampling""",
    "the model's and the tokenizer's own classes and configuration are taken": """
        base_model_config cls_model_config model_type type_of_model tokenizer_config tokenizer_type tokenizer_use_fast
        tokenizer_legacy tokenizer_use_mistral_common tokenizer_save_jinja_files processor_type model_config
        overrides_of_model_config model_kwargs overrides_of_model_kwargs is_falcon_derived_model
        is_llama_derived_model is_mistral_derived_model is_qwen_derived_model low_cpu_mem_usage""",
    "the tokenizer's own tokens are taken; a pad token is never needed": "special_tokens",
    "tokens are not added to the vocabulary; save a model and tokenizer that have them, and name those": """
        tokens added_tokens_overrides resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings
        fix_untrained_tokens""",
    "the end of a turn is found by writing one with the chat template": "eot_tokens",
    "there is no such key; a chat template can hold it": "default_system_message",
    "quantised weights are nf4 or int8 of bitsandbytes": """
        gptq bnb_config_kwargs model_quantization_config model_quantization_config_kwargs quantize_moe_experts qat
        quantization peft.group_size""",
    "a run begins with new adapters; merge the old ones into the model and name that": "lora_model_dir",
    "these adapters are not made here": """
        lora_fan_in_fan_out lora_target_parameters peft_layers_to_transform peft_layers_pattern peft.loftq_config
        peft_layer_replication peft_init_lora_weights peft_trainable_token_indices peft_ensure_weight_tying
        peft_autocast_adapter_dtype lora_on_cpu relora relora_prune_ratio relora_prune_method relora_cpu_offload
        relora_steps relora_warmup_steps relora_anneal_steps jagged_restart_steps jagged_restart_warmup_steps
        jagged_restart_anneal_steps lisa_n_layers lisa_step_interval lisa_layers_attribute""",
    "adapters are saved apart; merge them with `fastpref merge`": "merge_lora merge_method",
    "the whole model or adapters are trained, and nothing between": """
        unfrozen_parameters freeze_mm_modules reinit_weights""",
    "one learning rate for all, falling to zero": """
        embedding_lr embedding_lr_scale loraplus_lr_ratio loraplus_lr_embedding lr_groups lr_scheduler_kwargs
        lr_quadratic_warmup cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor""",
    "AdamW has betas 0.9 and 0.999 and epsilon 1e-8": """
        adam_beta1 adam_beta2 adam_beta3 adam_epsilon adam_epsilon2 optim_args optim_target_modules torchdistx_path
        dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap
        qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size
        qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size""",
    "matrix products are torch's, at its defaults": "tf32 fp8 fp8_enable_fsdp_float8_all_gather",
    "layers are kept or computed again (train.checkpointing), not moved": """
        gradient_checkpointing_kwargs layer_offloading embeddings_skip_upcast""",
    "only the responses are trained on": "train_on_inputs",
    "prompts and responses have the limits of tokens.max_length, in evaluation too": """
        eval_sequence_len min_sample_len use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks
        trl.max_completion_length""",
    "micro-batches go by train.tokens_per_microbatch, in evaluation too": "eval_batch_size auto_find_batch_size",
    "a run evaluates at its start and end, and every eval.every steps": "eval_strategy evaluation_strategy",
    "held-out prompts are answered greedily: eval.samples, eval.sample_tokens": """
        eval_table_size eval_max_new_tokens dpo_generate_during_eval generation_temperature generation_top_p
        generation_top_k generation_prompt_ratio generation_do_sample""",
    "evaluation has the training's metrics": """
        do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split include_tokens_per_second
        include_tkps""",
    "the last model is kept, and no run stops by its metrics": """
        metric_for_best_model greater_is_better early_stopping_patience load_best_model_at_end
        loss_watchdog_threshold loss_watchdog_patience""",
    "runs are not resumed yet": "resume_from_checkpoint auto_resume_from_checkpoints",
    "the model is saved at the end, as safetensors": """
        save_strategy save_first_step save_only_model save_safetensors dynamic_checkpoint""",
    "what is uploaded is the result, once, at the end": "hub_strategy hub_revision",
    "private data and models need `hf auth login`": "hf_use_auth_token",
    "a tracker is told by its own environment variables": """
        wandb_name wandb_run_id wandb_mode wandb_entity wandb_watch wandb_log_model mlflow_run_name
        hf_mlflow_log_artifacts comet_api_key comet_workspace comet_experiment_key comet_mode comet_online
        comet_experiment_config trackio_run_name trackio_space_id""",
    "there is no such report": """
        use_otel_metrics otel_metrics_host otel_metrics_port profiler_steps profiler_steps_start""",
    "a finished model is talked to by other programs": """
        gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature""",
    "fastpref has no plugins or trainer classes": "plugins trainer_cls",
    "it is not preference training": """
        reward_model process_reward_model center_rewards_coefficient num_labels pretraining_dataset
        pretraining_sample_concatenation pretrain_multipack_buffer_size pretrain_multipack_attn use_eaft eaft_alpha
        eaft_k""",
    "generation while training is not done here (GRPO)": """
        vllm ebft trl.use_vllm trl.vllm_mode trl.vllm_device trl.vllm_gpu_memory_utilization trl.vllm_dtype
        trl.vllm_max_model_len trl.vllm_server_host trl.vllm_server_port trl.vllm_server_timeout
        trl.vllm_guided_decoding_regex trl.vllm_enable_prefix_caching trl.reward_funcs trl.reward_weights
        trl.num_generations trl.log_completions trl.num_completions_to_print trl.scale_rewards trl.temperature
        trl.top_p trl.top_k trl.min_p trl.repetition_penalty trl.num_iterations trl.epsilon trl.epsilon_high
        trl.use_liger_loss trl.loss_type trl.mask_truncated_completions trl.importance_sampling_level
        trl.generation_kwargs trl.chat_template_kwargs trl.rollout_func""",
    "the reference stays what it was at the start": """
        trl.sync_ref_model trl.ref_model_mixup_alpha trl.ref_model_sync_steps""",
    "noise in the embeddings is not offered": "neftune_noise_alpha noisy_embedding_alpha",
    "images are not read": "image_size image_resize_algorithm",
    "models are taken as they are": "llama4_linearized_experts rope_scaling",
    "it is gone from Axolotl too": "max_packed_sequence_len",
    "it is about Axolotl's own command": "strict axolotl_config_path total_num_tokens total_supervised_tokens debug",
}
REASONS: dict[str, str] = {field: reason for reason, fields in _BY_REASON.items() for field in fields.split()}
# fields whose `false` says something that is not so here
EVEN_IF_OFF = ("sample_packing", "shuffle_merged_datasets")
