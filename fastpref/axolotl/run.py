"""Rules for held-out data, tokens, the optimization, output and logging."""

from collections.abc import Callable

from fastpref.axolotl import rows
from fastpref.axolotl.source import Axolotl, Left, Made, Setting, dotted


def held_out(config: Axolotl) -> Made:
    yield from rows.entries(config, "test_datasets", ("eval", "data"))
    share = config.number("val_set_size", 0)
    if "test_datasets" in config and share:
        yield Left("val_set_size", "test_datasets are held out")
    elif share >= 1:
        yield Left("val_set_size", "a number of rows cannot be held out; set eval.fraction to a share below 1")
    elif share:
        yield Setting(dotted("eval.fraction"), share, ("val_set_size",), "by a hash of the prompt")


def length(config: Axolotl) -> Made:
    given = config.given("sequence_len")
    yield Setting(dotted("tokens.max_length"), sequence(config), given, "" if given else "Axolotl's default")
    if "max_prompt_len" in config:
        yield Setting(dotted("tokens.max_prompt_length"), config.whole("max_prompt_len"), ("max_prompt_len",))


def sequence(config: Axolotl) -> int:
    return config.whole("sequence_len", 512)


def overlong(config: Axolotl) -> Made:
    given = config.given("excess_length_strategy")
    strategy = config.text("excess_length_strategy", "drop")
    words = "" if given else "Axolotl's default"
    yield Setting(dotted("tokens.overlong"), {"raise": "error"}.get(strategy, strategy), given, words)


def template(config: Axolotl) -> Made:
    template, lost = rows.chat_template(config.values)
    yield from lost
    if template is not None:
        yield Setting(dotted("tokens.chat_template"), template, config.given("chat_template", "chat_template_jinja"))


def keywords(config: Axolotl) -> Made:
    table = {name: value for name, value in config.table("chat_template_kwargs").items() if value is not None}
    if table:
        yield Setting(dotted("tokens.chat_template_kwargs"), table, ("chat_template_kwargs",))


def batch(config: Axolotl) -> Made:
    micro = config.whole("micro_batch_size", 1)
    steps = config.whole("gradient_accumulation_steps", 1)
    if "batch_size" in config:
        yield Setting(dotted("train.batch"), config.whole("batch_size"), ("batch_size",))
    else:
        words = f"gradient_accumulation_steps {steps} × micro_batch_size {micro}"
        fields = ("gradient_accumulation_steps", "micro_batch_size")
        yield Setting(dotted("train.batch"), micro * steps, fields, words)
    words = f"micro_batch_size {micro} × 2 completions × sequence_len {sequence(config)}"
    tokens = 2 * micro * sequence(config)
    yield Setting(dotted("train.tokens_per_microbatch"), tokens, ("micro_batch_size", "sequence_len"), words)


def steps(config: Axolotl) -> Made:
    if config.whole("max_steps", 0) > 0:
        yield Setting(dotted("train.steps"), config.whole("max_steps"), ("max_steps",))


def schedule(config: Axolotl) -> Made:
    scheduler = config.text("lr_scheduler", "cosine")
    if "lr_scheduler" in config:
        schedule = scheduler.replace("constant_with_warmup", "constant")
        yield Setting(dotted("train.schedule"), schedule, ("lr_scheduler",))
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


OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_apex_fused": "adamw",
    "optimi_adamw": "adamw", "adamw_torch_xla": "adamw", "paged_adamw_32bit": "paged_adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "adamw_torch_8bit": "adamw_8bit",
    "ao_adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip


def optimizer(config: Axolotl) -> Made:
    if "optimizer" in config:
        name = config.text("optimizer")
        yield Setting(dotted("train.optimizer"), OPTIMIZERS.get(name, name), ("optimizer",))


def checkpointing(config: Axolotl) -> Made:
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


def every(field: str, key: str, per_epoch: str) -> Callable[[Axolotl], Made]:
    """Make a rule for the steps between two evaluations or checkpoints: a number, or a share of max_steps."""

    def make(config: Axolotl) -> Made:
        steps = config.number(field, 0)
        total = config.whole("max_steps", 0)
        if steps >= 1:
            yield Setting(dotted(key), config.whole(field), (field,))
        elif steps and total > 0:
            yield Setting(dotted(key), max(1, round(steps * total)), (field, "max_steps"))
        elif steps:
            yield Left(field, f"a share of all steps, whose number is not known here; set {key}")
        if config.number(per_epoch, 0):
            yield Left(per_epoch, f"the number of steps in an epoch is not known here; set {key}")

    return make


def samples(config: Axolotl) -> Made:
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
    "comet": ("use_comet", "comet_project_name"),
    "trackio": ("use_trackio", "trackio_project_name"),
}


def trackers(config: Axolotl) -> Made:
    names, fields = [], []
    for name, switches in TRACKERS.items():
        active = [field for field in switches if config.get(field)]
        if active and config.get(switches[0]) is not False and config.get(f"{name}_mode") != "disabled":
            names.append(name)
            fields += active
    if names:
        yield Setting(dotted("log.trackers"), names, tuple(fields))
    for switches in TRACKERS.values():
        for field in switches[1:]:
            if config.get(field):
                yield Left(field, "a tracker takes its settings from its own environment variables")
