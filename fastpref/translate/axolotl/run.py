"""Rules for held-out data, tokens, the optimization, output and logging."""

from fastpref.translate.axolotl import rows
from fastpref.translate.fields import Fields, Left, Made, Setting, dotted
from fastpref.translate.trainer_arguments import NOT_BEST, every_steps, metric_name


def held_out(config: Fields) -> Made:
    yield from rows.entries(config, "test_datasets", ("eval", "data"))
    share = config.number("val_set_size", 0)
    if "test_datasets" in config and share:
        yield Left("val_set_size", "test_datasets are held out")
    elif share >= 1:
        yield Left("val_set_size", "a number of rows cannot be held out; set eval.fraction to a share below 1")
    elif share:
        yield Setting(dotted("eval.fraction"), share, ("val_set_size",), "by a hash of the prompt")


def length(config: Fields) -> Made:
    given = config.given("sequence_len")
    yield Setting(dotted("tokens.max_length"), sequence(config), given, "" if given else "Axolotl's default")
    if "max_prompt_len" in config:
        yield Setting(dotted("tokens.max_prompt_length"), config.whole("max_prompt_len"), ("max_prompt_len",))


def sequence(config: Fields) -> int:
    return config.whole("sequence_len", 512)


def overlong(config: Fields) -> Made:
    given = config.given("excess_length_strategy")
    strategy = config.text("excess_length_strategy", "drop")
    words = "" if given else "Axolotl's default"
    yield Setting(dotted("tokens.overlong"), {"raise": "error"}.get(strategy, strategy), given, words)


def template(config: Fields) -> Made:
    template, lost = rows.chat_template(config.values)
    yield from lost
    if template is not None:
        yield Setting(dotted("tokens.chat_template"), template, config.given("chat_template", "chat_template_jinja"))


def keywords(config: Fields) -> Made:
    table = {name: value for name, value in config.table("chat_template_kwargs").items() if value is not None}
    if table:
        yield Setting(dotted("tokens.chat_template_kwargs"), table, ("chat_template_kwargs",))


def batch(config: Fields) -> Made:
    micro = config.whole("micro_batch_size", 1)
    steps = config.whole("gradient_accumulation_steps", 1)
    if "batch_size" in config:
        yield Setting(dotted("train.batch"), config.whole("batch_size"), ("batch_size",))
    else:
        words = f"gradient_accumulation_steps {steps} × micro_batch_size {micro}"
        fields = ("gradient_accumulation_steps", "micro_batch_size")
        yield Setting(dotted("train.batch"), micro * steps, fields, words)
    each = 1 if config.method == "sft" else 2
    words = f"micro_batch_size {micro}{' × 2 completions' if each == 2 else ''} × sequence_len {sequence(config)}"
    tokens = each * micro * sequence(config)
    yield Setting(dotted("train.tokens_per_microbatch"), tokens, ("micro_batch_size", "sequence_len"), words)


def schedule(config: Fields) -> Made:
    scheduler = config.text("lr_scheduler", "cosine")
    if "lr_scheduler" in config:
        schedule = scheduler.replace("constant_with_warmup", "constant")
        yield Setting(dotted("train.schedule"), schedule, ("lr_scheduler",))
    if config.get("lr_scheduler_kwargs"):
        yield Setting(dotted("train.schedule_options"), config.table("lr_scheduler_kwargs"), ("lr_scheduler_kwargs",))
    ratio = config.number("cosine_min_lr_ratio", 0)
    if ratio and scheduler == "cosine" and "learning_rate" in config:
        words = f"cosine_min_lr_ratio {ratio:g} × learning_rate"
        rate = float(f"{ratio * config.number('learning_rate'):.10g}")
        yield Setting(dotted("train.min_lr"), rate, ("cosine_min_lr_ratio",), words)
    elif ratio:
        yield Left("cosine_min_lr_ratio", f"lr_scheduler: {scheduler} does not read it")
    if scheduler == "constant":  # transformers' schedule of this name has no warmup
        yield Setting(dotted("train.warmup"), 0, ("lr_scheduler",), "lr_scheduler: constant has none")
        for field in config.given("warmup_steps", "warmup_ratio"):
            if config.get(field):
                yield Left(field, "lr_scheduler: constant has no warm-up")
    elif "warmup_steps" in config:
        yield Setting(dotted("train.warmup"), config.whole("warmup_steps"), ("warmup_steps",))
        if "warmup_ratio" in config:
            yield Left("warmup_ratio", "warmup_steps goes before it")
    elif config.number("warmup_ratio", 0) >= 1:
        yield Left("warmup_ratio", "a share of all steps is below 1")
    else:
        given = config.given("warmup_ratio")
        share = config.number("warmup_ratio", 0.03)
        yield Setting(dotted("train.warmup"), share, given, "" if given else "Axolotl's default")


def checkpointing(config: Fields) -> Made:
    fields = ("gradient_checkpointing", "activation_offloading")
    given = {field: config.get(field) for field in fields if config.get(field) is not None}
    if any(given.values()):
        yield Setting(dotted("train.checkpointing"), True, tuple(given))
    elif "gradient_checkpointing" in given:
        yield Setting(dotted("train.checkpointing"), False, ("gradient_checkpointing",))
    moving = [field for field, value in given.items() if isinstance(value, str) or (value and field == fields[1])]
    if moving:
        yield Setting(dotted("train.offload_activations"), True, tuple(moving))
    for field in moving:
        if "disk" in str(given[field]):
            yield Left(field, f"{given[field]}: activations go to host memory, not to a disk")


def evaluations(config: Fields) -> Made:
    key = "eval.every"
    if config.get("eval_steps"):
        yield from every_steps(config, "eval_steps", key)
    elif config.number("evals_per_epoch", 0):
        yield from per_epoch(config, "evals_per_epoch", key)
    elif config.text("eval_strategy", "no") == "epoch":
        yield from per_epoch(config, "eval_strategy", key)


def checkpoints(config: Fields) -> Made:
    """Translate when checkpoints are saved, which is every epoch unless something else is said, and how many stay."""
    key, kept = "output.save_every", config.given("save_total_limit")
    words = []
    if config.get("save_steps"):
        words += every_steps(config, "save_steps", key)
    elif config.number("saves_per_epoch", 0):
        words += per_epoch(config, "saves_per_epoch", key)
    elif config.text("save_strategy", "epoch") == "epoch":
        words += per_epoch(config, "save_strategy", key)
    yield from words
    if any(isinstance(word, Setting) for word in words) or kept:
        yield Setting(
            dotted("output.keep"), config.whole("save_total_limit", 0) or 4, kept, "" if kept else "Axolotl's default"
        )


def per_epoch(config: Fields, field: str, key: str) -> Made:
    """Translate so many times in each epoch into a share of the run, as Axolotl does; a strategy means one."""
    epochs = config.number("num_epochs", 1.0)
    times = 1 if field.endswith("strategy") else config.number(field)
    given = config.given(field)
    if config.whole("max_steps", 0) > 0 and times == 1 and field.endswith("strategy"):
        if given:
            yield Left(
                field, f"max_steps decides the length of the run, not the epochs; set {key} to a number of steps"
            )
    elif epochs * times > 1:
        words = f"{field} {times:g} × num_epochs {epochs:g}" if times != 1 else f"every one of {epochs:g} epochs"
        share = round(1 / (epochs * times), 6)
        yield Setting(dotted(key), share, given, words if given else f"Axolotl's default: {words}")


def stop(config: Fields) -> Made:
    """Translate early stopping. The metric of transformers is eval_loss unless another is named."""
    if config.whole("early_stopping_patience", 0):
        metric = config.text("metric_for_best_model", "loss")
        table = {"after": config.whole("early_stopping_patience"), "metric": metric_name(metric)}
        fields = config.given("early_stopping_patience", "metric_for_best_model")
        yield Setting(dotted("train.stop"), table, fields)
    elif config.get("metric_for_best_model"):
        yield Left("metric_for_best_model", "checkpoints/best.json names the best checkpoint by the evaluation's loss")
    if config.get("load_best_model_at_end") and "early_stopping_patience" not in config:
        yield Left("load_best_model_at_end", NOT_BEST)


def neftune(config: Fields) -> Made:
    given = config.given("neftune_noise_alpha", "noisy_embedding_alpha")
    if given:
        words = "" if config.method == "sft" else f"{given[0]}, which Axolotl reads in supervised training only"
        yield Setting(dotted("train.neftune_alpha"), config.number(given[0]), given, words)


def new_tokens(config: Fields) -> Made:
    special = dict(config.table("special_tokens"))
    more = special.pop("additional_special_tokens", [])
    names = [*config.names("tokens"), *(more if isinstance(more, list) else [more])]
    if names:
        fields = (*config.given("tokens"), *(("special_tokens",) if more else ()))
        yield Setting(dotted("tokens.add"), names, fields, "only their rows are trained")
    if special:
        why = f"{', '.join(special)}: the tokenizer keeps the tokens that its files name; name a copy that has others"
        yield Left("special_tokens", why)


def samples(config: Fields) -> Made:
    samples = config.given("num_generation_samples")
    tokens = config.given("generation_max_new_tokens")
    if config.on("generate_samples"):
        count, length = config.whole("num_generation_samples", 3), config.whole("generation_max_new_tokens", 50)
        yield Setting(dotted("eval.samples"), count, ("generate_samples", *samples))
        yield Setting(dotted("eval.sample_tokens"), length, ("generate_samples", *tokens))
    else:
        yield from (Left(field, "generate_samples is not on") for field in (*samples, *tokens))


TRACKERS = {
    "wandb": ("use_wandb", "wandb_project"),
    "mlflow": ("use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name"),
    "tensorboard": ("use_tensorboard",),
    "comet_ml": ("use_comet", "comet_project_name"),
    "trackio": ("use_trackio", "trackio_project_name"),
}


def trackers(config: Fields) -> Made:
    names, fields = [], []
    for name, switches in TRACKERS.items():
        active = [field for field in switches if config.get(field)]
        if (
            active
            and config.get(switches[0]) is not False
            and config.get(f"{name.removesuffix('_ml')}_mode") != "disabled"
        ):
            names.append(name)
            fields += active
    if names:
        yield Setting(dotted("log.trackers"), names, tuple(fields))
    for switches in TRACKERS.values():
        for field in switches[1:]:
            if config.get(field):
                yield Left(field, "a tracker takes its settings from its own environment variables")
