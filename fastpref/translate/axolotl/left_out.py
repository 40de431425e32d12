"""The fields of Axolotl without a counterpart in fastpref, grouped by the reason."""

GROUPS: dict[str, str] = {  # reason → names of fields, in which * stands for any text
    "rows are packed without padding (train.layout), which changes no result": """
        sample_packing sample_packing_* eval_sample_packing pad_to_* batch_flattening multipack_real_batches
        dpo_padding_free group_by_length max_packed_sequence_len""",
    "`accelerate launch` runs fastpref on several devices, by DDP or FSDP; train.batch counts the pairs of all": """
        deepspeed deepcompile fsdp fsdp_* ddp ddp_* dp_* world_size local_rank device device_map max_memory
        gpu_memory_limit sequence_parallel_degree context_parallel_size heads_k_stride ring_attn_func
        tensor_parallel_size qlora_sharded_model_loading accelerator_config use_ray ray_* resources_per_worker
        experimental_skip_move_to_device""",
    "model.attention chooses FlexAttention, FlashAttention-2 or SDPA; by default the model and the device decide": """
        flash_* sdp_attention s2_attention xformers_attention flex_attention flex_attn_compile_kwargs eager_attention
        sage_attention attn_implementation gemma4_hybrid_attn_impl scaling_softmax scaling_softmax_*""",
    "the head is always fused with the loss and never holds the logits": """
        dpo_use_l* liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling chunked_cross_entropy
        chunked_cross_entropy_* cut_cross_entropy""",
    "fastpref has its own LoRA layers, and norms, RoPE and MLPs of liger-kernel (model.liger), and no others": """
        lora_*_kernel unsloth_* use_kernels tiled_mlp tiled_mlp_* torch_compile torch_compile_*
        experts_implementation""",
    "rows are read as they are and tokenized once, into fastpref's own cache": """
        remove_unused_columns dataset_p* dataset_num_proc dataset_keep_in_memory dataset_shard_* skip_prepare_dataset
        num_dataset_shards_to_save streaming streaming_* dataloader_* push_dataset_to_hub is_preprocess
        preprocess_*""",
    "rows are shuffled anew in every epoch, by train.seed": "shuffle_* curriculum_sampling",
    "the model and the tokenizer are loaded as their files say; name a copy that has the change": """
        base_model_config cls_model_config model_type type_of_model tokenizer_* processor_type model_config
        overrides_of_* model_kwargs is_*_derived_model low_cpu_mem_usage added_tokens_overrides
        resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings fix_untrained_tokens
        llama4_linearized_experts rope_scaling""",
    "the chat template writes each turn and its end, and only completions are trained on": """
        eot_tokens default_system_message train_on_inputs""",
    "model.quantization is nf4 or int8, by bitsandbytes": """
        gptq bnb_config_kwargs model_quantization_config model_quantization_config_* qat
        quantization peft.group_size""",
    "model.quantization is that of the experts too": "quantize_moe_experts",
    "[lora] makes LoRA, rsLoRA and DoRA adapters, and no others": """
        lora_fan_in_fan_out lora_target_parameters peft_layers_pattern peft_layer_replication
        peft_trainable_token_indices peft_ensure_weight_tying peft_autocast_adapter_dtype lora_on_cpu relora relora_*
        jagged_restart_* lisa_*""",
    "`fastpref merge` merges adapters after the training": "merge_lora merge_method",
    "the whole model is trained, or adapters and lora.modules_to_save": """
        unfrozen_parameters freeze_mm_modules reinit_weights""",
    "all parameters have one learning rate and schedule, but those of lora.plus_ratio": """
        embedding_lr embedding_lr_scale loraplus_lr_embedding lr_groups lr_quadratic_warmup cosine_constant_lr_ratio
        lr_div_factor""",
    "train.optimizer takes train.betas and train.epsilon, and no further options": """
        adam_epsilon2 adam_beta3 optim_args optim_target_modules torchdistx_path dion_* qgalore_*""",
    "matrix products have the precision of model.dtype, by PyTorch's defaults": """
        tf32 fp8 fp8_* embeddings_skip_upcast""",
    "train.checkpointing and train.offload_activations have no further options": """
        gradient_checkpointing_kwargs layer_offloading""",
    "tokens.max_length limits a prompt with its completion, in training and in evaluation": """
        eval_sequence_len min_sample_len use_pose pose_* trl.max_completion_length""",
    "train.tokens_per_microbatch limits a micro-batch, in training and in evaluation": """
        eval_batch_size auto_find_batch_size""",
    "a run evaluates at its start, its end and every eval.every steps, with its own metrics and greedy answers": """
        evaluation_strategy eval_table_size eval_max_new_tokens dpo_generate_during_eval
        generation_temperature generation_top_* generation_prompt_ratio generation_do_sample do_causal_lm_eval
        eval_causal_lm_metrics do_bench_eval bench_* include_*""",
    "whether a metric should rise or fall is known of each": "greater_is_better",
    "a run stops by train.stop, or at a loss that is not finite": "loss_watchdog_*",
    "`fastpref train --resume` resumes a run": "resume_from_checkpoint auto_resume_from_checkpoints",
    "output.save_every saves checkpoints, and the model is saved at the end, as safetensors": """
        save_first_step save_only_model save_safetensors dynamic_checkpoint""",
    "the result is uploaded once, at the end, with the access that `hf auth login` gives": """
        hub_strategy hub_revision hf_use_auth_token""",
    "a tracker takes its settings from its own environment variables": """
        wandb_* mlflow_* hf_mlflow_log_artifacts comet_* trackio_*""",
    "`fastpref chat` talks to a finished model": "gradio_*",
    "it is not preference training": """
        reward_model process_reward_model center_rewards_coefficient num_labels pretrain* use_eaft eaft_*""",
    "fastpref generates no completions to train on": """
        vllm ebft trl.use_* trl.vllm_* trl.reward_* trl.num_* trl.log_completions trl.scale_rewards trl.temperature
        trl.top_* trl.min_p trl.repetition_penalty trl.epsilon trl.epsilon_high trl.loss_type
        trl.mask_truncated_completions trl.importance_sampling_level trl.generation_kwargs trl.chat_template_kwargs
        trl.rollout_func""",
    "fastpref has nothing like it": """
        plugins trainer_cls use_otel_metrics otel_* profiler_* image_*
        gc_steps strict axolotl_config_path total_num_tokens total_supervised_tokens debug""",
}
# fields whose value `false` requests something that fastpref does not do
EVEN_IF_OFF = ("sample_packing", "shuffle_merged_datasets")
