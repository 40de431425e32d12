"""The fields of LLaMA-Factory's configs without a counterpart in fastpref, grouped by the reason."""

from fastpref.translate.left_out import ATTENTION, REASONS, merged

GROUPS = merged(
    REASONS,
    {  # reason → names of fields, in which * stands for any text
        ATTENTION: "flash_attn shift_attn",
        "the model and the tokenizer are loaded as their files say; name a copy that has the change": """
            cache_dir use_fast_tokenizer resize_vocab split_special_tokens new_special_tokens_config init_special_tokens
            low_cpu_mem_usage rope_scaling mixture_of_depths upcast_* train_from_scratch adapter_folder""",
        "fastpref has its own LoRA layers, and norms, RoPE and MLPs of liger-kernel (model.liger), and no others": """
            use_unsloth use_unsloth_gc use_v1_kernels use_kt kt_* cpu_infer chunk_size mode""",
        "the model's own coefficient weighs the load-balancing loss of experts": "moe_aux_loss_coef",
        "train.checkpointing and train.offload_activations have no further options": """
            use_reentrant_gc gradient_checkpointing activation_checkpointing""",
        "it is for answers, not for training": """
            infer_backend infer_dtype offload_folder use_kv_cache vllm_* sglang_* do_sample temperature top_p top_k
            num_beams max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens
            default_system system_message""",
        "`fastpref merge` and `fastpref export` make files of a result": "export_*",
        "the access is that of `hf auth login`": "hf_hub_token ms_hub_token om_hub_token",
        "`fastpref train` shows what is trained": "print_param_status",
        "every run has its curves in report.html": "plot_loss",
        "model.quantization is nf4 or int8, by bitsandbytes": "quantization_device_map",
        "matrix products have the precision of model.dtype, by PyTorch's defaults": "fp8 fp8_*",
        "images, videos and sounds are not trained on": """
            image_* video_* crop_to_patches use_audio_in_video audio_sampling_rate media_dir freeze_vision_tower
            freeze_multi_modal_projector freeze_language_model""",
        "only completions are trained on": "train_on_prompt ignore_pad_token_for_loss",
        "every turn of the assistant is trained on": "mask_history",
        "rows are read as they are and tokenized once, into fastpref's own cache": """
            streaming buffer_size overwrite_cache preprocessing_batch_size preprocessing_num_workers tokenized_path
            data_shared_file_system""",
        "data sets are concatenated; weight repeats the rows of one": "mix_strategy interleave_probs",
        "rows are shuffled anew in every epoch, by train.seed": "disable_shuffling",
        "calls of tools are written by the chat template": "tool_format",
        "a run evaluates at its start, its end and every eval.every steps, with its own metrics": """
            eval_on_each_dataset eval_num_beams compute_accuracy include_effective_tokens_per_second
            predict_with_generate generation_*""",
        "[lora] has one learning rate for embeddings and other modules": "loraplus_lr_embedding",
        "adapters are saved for the original model in any case": "pissa_convert",
        "fastpref trains lora, full and freeze": "module_dropout oft_* use_mca",
        "it is for stages that fastpref does not train": "ppo_* reward_model reward_model_*",
        "it is for optimizers that fastpref does not have": "galore_* apollo_* badam_*",
        "the loss is the negative log-likelihood": "use_dft_loss use_eaft_loss eaft_alpha use_asft_loss asft_alpha",
        "a tracker takes its settings from its own environment variables": "swanlab_*",
        'log.trackers = ["swanlab"] is its name': "use_swanlab",
        "`accelerate launch` runs fastpref on several devices, by DDP or FSDP; train.batch counts the rows of all": """
            ray_* resources_per_worker placement_strategy""",
        "whether a metric should rise or fall is known of each": "greater_is_better",
        "sorting rows by length changes the batches": "sortish_sampler",
    },
)
