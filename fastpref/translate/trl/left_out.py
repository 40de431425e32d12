"""The fields of TRL's configs without a counterpart in fastpref, grouped by the reason."""

from fastpref.translate.trainer_arguments import ATTENTION, NOT_BEST, REASONS, merged

GROUPS = merged(
    REASONS,
    {  # reason → names of fields, in which * stands for any text
        "environment variables are set where fastpref is started": "env",
        ATTENTION: "attn_implementation",
        "the model is loaded as its files say; name a copy that has the change": """
            model_init_kwargs eos_token pad_token""",
        "it is for reward models": "lora_task_type",
        "lora.target names the experts' modules": "lora_target_parameters",
        "model.quantization is nf4 or int8, by bitsandbytes": "bnb_4bit_quant_storage",
        "the model's own coefficient weighs the load-balancing loss of experts": "router_aux_loss_coef",
        "rows are read as they are and tokenized once, into fastpref's own cache": """
            dataset_num_proc dataset_kwargs dataset_streaming streaming""",
        "rows are packed without padding (train.layout), which changes no result": """
            packing packing_strategy eval_packing pad_to_multiple_of padding_free""",
        "rows are shuffled anew in every epoch, by train.seed": "shuffle_dataset",
        "plain texts without a prompt are not trained on": "dataset_text_field",
        "the reference is computed in micro-batches of train.tokens_per_microbatch": "precompute_ref_batch_size",
        "it mends a fault of DDP that fastpref does not have": "ignore_bias_buffers",
        NOT_BEST: "load_best_model_at_end",
        "checkpoints/best.json names the best checkpoint by the evaluation's loss": """
            metric_for_best_model greater_is_better""",
    },
)
