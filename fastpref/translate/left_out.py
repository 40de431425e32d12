"""Reasons for fields without a counterpart that several trainers share, among them those of TrainingArguments."""

from collections.abc import Mapping

BEST = "checkpoints/best.json names the best checkpoint by its accuracy, or its loss; train.stop takes another metric"
NO_EPOCHS = "max_steps decides the length of the run, not the epochs; set {key} to a number of steps"
NOT_BEST = "final/ is the last model, unless train.stop ends the run; checkpoints/best.json names the best checkpoint"
PACKED = "a row there is then as many as fit its length, so that a step has more; set train.batch to the rows of a step"
NO_PADDING = "rows are packed without padding (train.layout), which changes no result"
ATTENTION = (
    "model.attention chooses FlexAttention, FlashAttention-2 or SDPA; by default the model and the device decide"
)
REASONS: dict[str, str] = {  # reason → names of fields, in which * stands for any text
    "`accelerate launch` runs fastpref on several devices, by DDP or FSDP; train.batch counts the rows of all": """
        deepspeed fsdp fsdp_config ddp_* accelerator_config parallelism_config local_rank use_cpu
        average_tokens_across_devices log_on_each_node save_on_each_node""",
    "rows are read as they are and tokenized once, into fastpref's own cache": """
        dataloader_* remove_unused_columns label_names length_column_name""",
    "rows are shuffled anew in every epoch, by train.seed": "train_sampling_strategy group_by_length data_seed",
    "train.tokens_per_microbatch limits a micro-batch, in training and in evaluation": """
        per_device_eval_batch_size auto_find_batch_size eval_accumulation_steps torch_empty_cache_steps""",
    "a run evaluates at its start, its end and every eval.every steps, with its own metrics": """
        eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object prediction_loss_only
        include_for_metrics include_num_input_tokens_seen batch_eval_metrics""",
    "`fastpref train` trains, and `fastpref eval` evaluates": "do_train do_eval do_predict",
    "matrix products have the precision of model.dtype, by PyTorch's defaults": """
        tf32 bf16_full_eval fp16_full_eval""",
    "train.checkpointing and train.offload_activations have no further options": """
        gradient_checkpointing_kwargs activation_checkpointing_kwargs""",
    "fastpref has its own LoRA layers, and norms, RoPE and MLPs of liger-kernel (model.liger), and no others": """
        torch_compile torch_compile_* liger_kernel_config""",
    "train.optimizer takes train.betas and train.epsilon, and no further options": "optim_args optim_target_modules",
    "the losses smooth labels by their own option, label_smoothing": "label_smoothing_factor",
    "`fastpref train --resume` resumes a run": """
        resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint overwrite_output_dir""",
    "output.save_every saves checkpoints, and the model is saved at the end, as safetensors": """
        save_only_model enable_jit_checkpoint save_safetensors""",
    "the result is uploaded once, at the end, with the access that `hf auth login` gives": """
        hub_token hub_private_repo hub_strategy hub_always_push hub_revision""",
    "a tracker takes its settings from its own environment variables": "run_name project trackio_* logging_dir",
    "fastpref writes its own log": """
        log_level log_level_replica logging_first_step logging_nan_inf_filter disable_tqdm skip_memory_metrics debug""",
    "runs are repeatable on the same machine as they are": "full_determinism",
    "a whole sequence is computed at once, without a cache of keys and values": "use_cache",
}


def merged(*tables: Mapping[str, str]) -> dict[str, str]:
    """Return the reasons of several tables, with the names of equal reasons together."""
    reasons: dict[str, str] = {}
    for table in tables:
        for reason, names in table.items():
            reasons[reason] = f"{reasons.get(reason, '')} {names}"
    return reasons
