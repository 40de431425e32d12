"""Whole configs as users of Axolotl write them, and every field of its schema."""

DPO = """
base_model: Qwen/Qwen2.5-0.5B
strict: false
chat_template: qwen_25
rl: dpo
datasets:
  - path: someone/alpaca_messages_2k_dpo
    type: chat_template.default
    field_messages: conversation
    field_chosen: chosen
    field_rejected: rejected
    message_property_mappings:
      role: role
      content: content
    roles:
      system: [system]
      user: [user]
      assistant: [assistant]
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/dpo-out
sequence_len: 2048
sample_packing: false
pad_to_sequence_len: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
"""

KTO_QLORA = """
base_model: meta-llama/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
rl: kto
rl_beta: 0.5
kto_desirable_weight: 0.2
datasets:
  - path: argilla/ultrafeedback-kto
    type: llama3.ultra
    split: train
val_set_size: 0.0
output_dir: ./outputs/qlora-out
remove_unused_columns: false
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: false  # not supported with kto
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: true
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
warmup_steps: 20
special_tokens:
  pad_token: "<|end_of_text|>"
"""

ORPO = """
base_model: mistralai/Mistral-7B-v0.1
model_type: MistralForCausalLM
rl: orpo
orpo_alpha: 0.2
remove_unused_columns: false
chat_template: chatml
datasets:
  - path: argilla/ultrafeedback-binarized-preferences-cleaned
    type: chat_template.argilla
    chat_template: chatml
val_set_size: 0.1
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_modules:
  - q_proj
  - v_proj
lora_modules_to_save: [embed_tokens, lm_head]
sequence_len: 4096
excess_length_strategy: truncate
micro_batch_size: 1
gradient_accumulation_steps: 16
learning_rate: 8e-6
lr_scheduler: linear
warmup_ratio: 0.1
max_grad_norm: 0.5
bf16: true
seed: 7
"""

SIMPO = """
base_model: org/sft
revision_of_model: v2
rl: simpo
rl_beta: 2.5
simpo_gamma: 1.25
cpo_alpha: 0.0
datasets:
  - path: org/pairs
    name: small
    revision: main
    type: {field_prompt: q, field_chosen: good, field_rejected: bad, prompt_format: "Q: {prompt}\\nA: "}
test_datasets:
  - path: org/pairs
    split: test
    type: chatml.intel
eval_steps: 50
max_steps: 500
batch_size: 32
micro_batch_size: 2
learning_rate: 1.0e-6
lr_scheduler: constant_with_warmup
fp16: true
bf16: false
"""

IPO = """
base_model: org/sft
trust_remote_code: true
rl: ipo
trl:
  beta: 0.05
  max_completion_length: 512
datasets:
  - path: org/pairs
    type:
max_prompt_len: 256
sequence_len: 1024
precompute_ref_log_probs: true
dataset_exact_deduplication: true
adapter: lora
lora_r: 8
lora_alpha: 16
peft_use_dora: true
peft_use_rslora: true
micro_batch_size: 4
gradient_accumulation_steps: 2
learning_rate: 5e-5
warmup_ratio: 0.0
optimizer: lion_8bit
deepspeed: deepspeed_configs/zero2.json
"""

# The fields of AxolotlInputConfig and its bases in 2026, without those that a config cannot have.
_FIELDS = """
base_model base_model_config cls_model_config tokenizer_config tokenizer_use_fast tokenizer_legacy
tokenizer_use_mistral_common tokenizer_type processor_type tokenizer_save_jinja_files trust_remote_code
experimental_skip_move_to_device use_kernels model_quantization_config model_quantization_config_kwargs output_dir
hub_model_id hub_strategy hub_revision save_safetensors load_in_8bit load_in_4bit adapter lora_model_dir lora_r
lora_alpha lora_fan_in_fan_out lora_target_modules lora_target_parameters lora_target_linear lora_modules_to_save
lora_dropout peft_layers_to_transform peft_layers_pattern peft.loftq_config peft.backend peft.weight_dtype
peft.group_size peft_use_dora peft_use_rslora peft_layer_replication peft_init_lora_weights
peft_trainable_token_indices peft_ensure_weight_tying peft_autocast_adapter_dtype qlora_sharded_model_loading
lora_on_cpu gptq bnb_config_kwargs loraplus_lr_ratio loraplus_lr_embedding merge_lora merge_method relora
relora_prune_ratio relora_prune_method relora_cpu_offload jagged_restart_steps jagged_restart_warmup_steps
jagged_restart_anneal_steps gradient_accumulation_steps micro_batch_size batch_size eval_batch_size
auto_find_batch_size train_on_inputs group_by_length learning_rate embedding_lr embedding_lr_scale weight_decay
optimizer optim_args optim_target_modules torchdistx_path lr_scheduler lr_scheduler_kwargs lr_quadratic_warmup
cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor lr_groups adam_epsilon adam_epsilon2 adam_beta1
adam_beta2 adam_beta3 dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank
qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size
qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size max_grad_norm num_epochs use_wandb wandb_name
wandb_run_id wandb_mode wandb_project wandb_entity wandb_watch wandb_log_model use_mlflow mlflow_tracking_uri
mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_comet comet_api_key comet_workspace
comet_project_name comet_experiment_key comet_mode comet_online comet_experiment_config use_trackio
trackio_project_name trackio_run_name trackio_space_id use_otel_metrics otel_metrics_host otel_metrics_port
lisa_n_layers lisa_step_interval lisa_layers_attribute gradio_title gradio_share gradio_server_name
gradio_server_port gradio_max_new_tokens gradio_temperature use_ray ray_run_name ray_num_workers
resources_per_worker image_size image_resize_algorithm model_config model_kwargs model_type model_revision
overrides_of_model_config overrides_of_model_kwargs type_of_model revision_of_model max_packed_sequence_len
rope_scaling noisy_embedding_alpha dpo_beta evaluation_strategy eval_table_size eval_max_new_tokens
dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss rpo_alpha s2_attention flash_attn_rms_norm strict
resume_from_checkpoint auto_resume_from_checkpoints resize_token_embeddings_to_32x mean_resizing_embeddings
shrink_embeddings embeddings_skip_upcast reinit_weights trainer_cls rl trl.beta trl.max_completion_length
trl.use_vllm trl.vllm_device trl.vllm_gpu_memory_utilization trl.vllm_dtype trl.vllm_max_model_len
trl.vllm_server_host trl.vllm_server_port trl.vllm_server_timeout trl.vllm_enable_prefix_caching trl.reward_funcs
trl.reward_weights trl.num_generations trl.log_completions trl.sync_ref_model trl.ref_model_mixup_alpha
trl.ref_model_sync_steps trl.scale_rewards trl.temperature trl.top_p trl.top_k trl.min_p trl.repetition_penalty
trl.num_iterations trl.epsilon vllm ebft qat quantization reward_model dynamic_checkpoint process_reward_model
center_rewards_coefficient num_labels dpo_use_weighting dpo_label_smoothing precompute_ref_log_probs
dpo_use_liger_kernel dpo_padding_free dpo_loss_type dpo_loss_weights datasets test_datasets shuffle_merged_datasets
shuffle_before_merging_datasets dataset_prepared_path dataset_shard_num dataset_shard_idx skip_prepare_dataset
num_dataset_shards_to_save pretraining_dataset dataset_processes dataset_num_proc dataset_exact_deduplication
dataset_keep_in_memory dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor dataloader_drop_last
accelerator_config remove_unused_columns push_dataset_to_hub hf_use_auth_token device device_map world_size
local_rank ddp seed ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters do_causal_lm_eval
eval_causal_lm_metrics do_bench_eval bench_dataset bench_split metric_for_best_model greater_is_better
loss_watchdog_threshold loss_watchdog_patience gc_steps bf16 fp16 fp8 fp8_enable_fsdp_float8_all_gather bfloat16
float16 tf32 float32 gradient_checkpointing gradient_checkpointing_kwargs activation_offloading layer_offloading
freeze_mm_modules unfrozen_parameters sequence_len excess_length_strategy eval_sequence_len min_sample_len
max_prompt_len sample_packing sample_packing_group_size sample_packing_bin_size sample_packing_sequentially
sample_packing_mp_start_method eval_sample_packing pad_to_sequence_len pad_to_multiple_of curriculum_sampling
multipack_real_batches batch_flattening use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks
pretrain_multipack_buffer_size pretrain_multipack_attn pretraining_sample_concatenation streaming
streaming_multipack_buffer_size xformers_attention sdp_attention flex_attention flex_attn_compile_kwargs
flash_attention flash_attn_cross_entropy flash_attn_fuse_mlp flash_optimum sage_attention eager_attention
attn_implementation gemma4_hybrid_attn_impl experts_implementation quantize_moe_experts scaling_softmax
scaling_softmax_factor scaling_softmax_bias lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel
chunked_cross_entropy chunked_cross_entropy_num_chunks use_eaft eaft_alpha eaft_k tiled_mlp tiled_mlp_num_shards
tiled_mlp_use_original_mlp llama4_linearized_experts deepspeed deepcompile fsdp fsdp_config fsdp_version
fsdp_final_state_dict_type val_set_size dp_shard_size dp_replicate_size sequence_parallel_degree
context_parallel_size heads_k_stride ring_attn_func tensor_parallel_size special_tokens tokens
added_tokens_overrides torch_compile torch_compile_backend torch_compile_mode max_steps warmup_steps warmup_ratio
eval_steps evals_per_epoch eval_strategy save_steps saves_per_epoch save_strategy save_total_limit save_first_step
logging_steps early_stopping_patience load_best_model_at_end save_only_model use_tensorboard profiler_steps
profiler_steps_start include_tokens_per_second include_tkps neftune_noise_alpha orpo_alpha simpo_gamma cpo_alpha
kto_desirable_weight kto_undesirable_weight rl_beta max_memory gpu_memory_limit low_cpu_mem_usage chat_template
chat_template_jinja chat_template_kwargs eot_tokens default_system_message fix_untrained_tokens is_preprocess
preprocess_iterable total_num_tokens total_supervised_tokens sample_packing_eff_est axolotl_config_path
is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model plugins
generate_samples num_generation_samples generation_max_new_tokens generation_temperature generation_top_p
generation_top_k generation_prompt_ratio generation_do_sample
"""
# The fields of SFTDataset, DPODataset, KTODataset and StepwiseSupervisedDataset.
_ENTRY_FIELDS = """
path split type input_transform shards shards_idx preprocess_shards conversation chat_template chat_template_jinja
data_files input_format name ds_type field field_human field_model field_messages field_tools field_thinking
template_thinking_key message_field_role message_field_content message_property_mappings message_field_training
message_field_training_detail split_thinking logprobs_field temperature roles_to_train train_on_eos roles
drop_system_message trust_remote_code revision step_separator max_completion_length train_on_last_step_only
field_chosen field_rejected
"""
FIELDS, ENTRY_FIELDS = _FIELDS.split(), _ENTRY_FIELDS.split()
