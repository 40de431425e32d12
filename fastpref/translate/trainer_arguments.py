"""Rules for the fields of transformers' TrainingArguments, which TRL and LLaMA-Factory share."""

import math
from collections.abc import Mapping, Sequence

from fastpref.translate.fields import Fields, Left, Made, Setting, dotted
from fastpref.translate.left_out import NO_EPOCHS, NO_PADDING, PACKED
from fastpref.translate.rule import Make, Rule, if_on, rule, same, with_default

EPOCHS = 3.0
"""transformers' default of num_train_epochs."""
_STEPS = 500
"""transformers' default of save_steps and logging_steps."""


def rules(learning_rate: Mapping[str, float], logging_steps: int) -> tuple[Rule, ...]:
    """Return the rules; a trainer has its own default of the learning rate, by the loss, and of logging_steps."""
    rates = ", ".join(f"{rate:g} ({loss})" for loss, rate in learning_rate.items())
    return (
        rule(
            "learning_rate", "train.learning_rate", _learning_rate(learning_rate),
            f"the same; without it {rates}" if len(set(learning_rate.values())) > 1
            else f"the same; without it {next(iter(learning_rate.values())):g}",
        ),
        rule(
            "lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio",
            "train.schedule train.schedule_options train.warmup", schedule,
            "without a name linear; without a warm-up 0; `warmup_steps` below 1 is a share, as `warmup_ratio`. "
            "`constant_with_warmup` is constant, `constant` also has warmup 0",
        ),
        with_default("num_train_epochs", "train.epochs", Fields.number, EPOCHS),
        rule("max_steps", "train.steps", steps, "the same"),
        rule("optim", "train.optimizer", optimizer("optim"), "the same names; without it AdamW"),
        rule("adam_beta1 adam_beta2", "train.betas", betas("optim"), "both, if one of them is there, or for Lion"),
        same("adam_epsilon", "train.epsilon", Fields.number),
        same("weight_decay", "train.weight_decay", Fields.number),
        same("max_grad_norm", "train.max_grad_norm", Fields.number),
        same(
            "neftune_noise_alpha", "train.neftune_alpha", Fields.number,
            "the same; each sequence is as long as itself here, and as its padded batch there, whose noise is less",
        ),
        same("seed", "train.seed", Fields.whole),
        same("output_dir", "output.dir", Fields.text),
        rule(
            "save_strategy save_steps", "output.save_every",
            cadence("save_steps", "save_strategy", "output.save_every", "steps", _STEPS),
            f"{SHARES}; without them {_STEPS}",
        ),
        same("save_total_limit", "output.keep", Fields.whole, "the same; without it all are kept there, and 2 here"),
        rule("push_to_hub hub_model_id", "output.push_to", push, "`hub_model_id`, if `push_to_hub` is on"),
        rule(
            "logging_strategy logging_steps", "log.every", logging(logging_steps),
            f"the same; a share below 1 is of `max_steps`; without it {logging_steps}",
        ),
        rule("report_to", "log.trackers", trackers, "the names; `none` is none"),
        if_on("use_liger_kernel", "model.liger", "auto"),
    )  # fmt: skip


SHARES = "steps; a share below 1 is of all steps; a strategy of epochs is 1 / `num_train_epochs` of them"


def _learning_rate(defaults: Mapping[str, float]) -> Make:
    def make(config: Fields) -> Made:
        given = config.given("learning_rate")
        rate = config.number("learning_rate", defaults.get(config.method, next(iter(defaults.values()))))
        yield Setting(dotted("train.learning_rate"), rate, given, "" if given else f"{config.trainer}'s default")

    return make


def schedule(config: Fields) -> Made:
    given = config.given("lr_scheduler_type")
    name = config.text("lr_scheduler_type", "linear")
    ours = name.replace("constant_with_warmup", "constant")
    yield Setting(dotted("train.schedule"), ours, given, "" if given else f"{config.trainer}'s default")
    options = config.table("lr_scheduler_kwargs")
    if options:
        yield Setting(dotted("train.schedule_options"), options, ("lr_scheduler_kwargs",))
    warmups = config.given("warmup_steps", "warmup_ratio")
    if name == "constant":  # transformers' schedule of this name has no warmup
        yield Setting(dotted("train.warmup"), 0, given, "constant has none")
        yield from (Left(field, "lr_scheduler_type: constant has no warm-up") for field in warmups if config.get(field))
        return
    count = config.number("warmup_steps", 0)
    if count >= 1:
        yield Setting(dotted("train.warmup"), config.whole("warmup_steps"), ("warmup_steps",))
        if config.get("warmup_ratio"):
            yield Left("warmup_ratio", "warmup_steps goes before it")
    else:
        field = "warmup_steps" if count else "warmup_ratio" if "warmup_ratio" in config else ""
        share = config.number(field, 0) if field else 0
        if share >= 1:
            yield Left(field, "a share of all steps is below 1")
        else:
            words = "" if warmups else f"{config.trainer}'s default"
            yield Setting(dotted("train.warmup"), share, (field,) if field else warmups, words)


def steps(config: Fields) -> Made:
    if config.whole("max_steps", 0) > 0:
        yield Setting(dotted("train.steps"), config.whole("max_steps"), ("max_steps",))


OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_apex_fused": "adamw",
    "optimi_adamw": "adamw", "adamw_torch_xla": "adamw", "adamw_torch_npu_fused": "adamw",
    "paged_adamw_32bit": "paged_adamw", "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit", "ao_adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
    "lion_32bit": "lion", "paged_lion_32bit": "paged_lion",
}  # fmt: skip
"""The optimizers of transformers and Axolotl that have another name in fastpref."""


def optimizer(field: str) -> Make:
    """Make the rule for the field that names the optimizer."""

    def make(config: Fields) -> Made:
        if field in config:
            name = config.text(field)
            yield Setting(dotted("train.optimizer"), OPTIMIZERS.get(name, name), (field,))

    return make


def betas(field: str) -> Make:
    """Make the rule for the betas of the optimizer that `field` names; transformers gives Lion those of AdamW."""

    def make(config: Fields) -> Made:
        given = config.given("adam_beta1", "adam_beta2")
        lion = "lion" in str(config.get(field, ""))
        if given or lion:
            pair = [config.number("adam_beta1", 0.9), config.number("adam_beta2", 0.999)]
            yield Setting(dotted("train.betas"), pair, given, "" if given else f"{config.trainer}'s default for Lion")

    return make


def cadence(field: str, strategy: str, key: str, default: str, every: int, instead: str = "") -> Make:
    """Make a rule for the steps between two evaluations or checkpoints.

    `default` is the strategy without the field of that name. Without `field` the steps are those of the field
    `instead`, or `every`.
    """

    def make(config: Fields) -> Made:
        chosen = config.text(strategy, default)
        given = config.given(strategy)
        if chosen == "steps" and field not in config and instead in config:
            yield from every_steps(config, instead, key)
        elif chosen == "steps":
            yield from every_steps(config, field, key, every)
        elif chosen == "epoch":
            yield from every_epoch(config, given, key, config.number("num_train_epochs", EPOCHS))
        elif chosen != "no":
            yield Left(strategy, f"{chosen}: only steps, epoch and no are known here")
        if chosen != "steps" and field in config:
            yield Left(field, f"{strategy} is {chosen}")

    return make


def evaluations(logging_steps: int) -> Rule:
    """Return the rule for the steps between evaluations, which are those between two logs if nothing is said."""
    make = cadence("eval_steps", "eval_strategy", "eval.every", "no", logging_steps, "logging_steps")
    how = f"{SHARES}; without `eval_steps` as `logging_steps`"
    return rule("eval_strategy eval_steps", "eval.every", make, how)


def every_steps(config: Fields, field: str, key: str, default: int | None = None) -> Made:
    """Translate a number of steps, or a share of all of them."""
    count = config.number(field, 0)
    total = config.whole("max_steps", 0)
    if count >= 1:
        yield Setting(dotted(key), config.whole(field), (field,))
    elif count > 0 and total > 0:
        yield Setting(dotted(key), math.ceil(count * total), (field, "max_steps"))
    elif count > 0:
        yield Setting(dotted(key), count, (field,), f"{field}, a share of all steps")
    elif default is not None and field not in config:
        yield Setting(dotted(key), default, (), f"{config.trainer}'s default")


def every_epoch(config: Fields, given: tuple[str, ...], key: str, epochs: float, times: float = 1) -> Made:
    """Translate so many times in each epoch into a share of the run, which is exact if it ends with an epoch."""
    words = f"{times:g} in each of {epochs:g} epochs" if times != 1 else f"every one of {epochs:g} epochs"
    if config.whole("max_steps", 0) > 0:
        reason = NO_EPOCHS.format(key=key)
    elif epochs < 1 or epochs != int(epochs):
        reason = f"the run does not end with an epoch; set {key} to a number of steps"
    elif epochs * times <= 1:
        return  # only at the end, where a run evaluates and saves in any case
    else:
        yield Setting(dotted(key), round(1 / (epochs * times), 6), given, words if given else f"default: {words}")
        return
    yield from (Left(field, reason) for field in given)


def metric_name(metric: str) -> str:
    """Return fastpref's name of a metric of an evaluation, for transformers' with or without its eval_."""
    return f"eval/{metric.removeprefix('eval_')}"


def logging(default: int) -> Make:
    def make(config: Fields) -> Made:
        strategy = config.text("logging_strategy", "steps")
        if strategy != "steps":
            yield Left("logging_strategy", "metrics are written every so many steps, by log.every")
            return
        count, total = config.number("logging_steps", default), config.whole("max_steps", 0)
        given = config.given("logging_steps")
        if count >= 1:
            words = "" if given else f"{config.trainer}'s default"
            yield Setting(dotted("log.every"), config.whole("logging_steps", default), given, words)
        elif count > 0 and total > 0:
            yield Setting(dotted("log.every"), math.ceil(count * total), (*given, "max_steps"))
        else:
            yield Left("logging_steps", "a share of all steps, whose number is not known here; set log.every")

    return make


def trackers(config: Fields) -> Made:
    given = config.get("report_to")
    names = [given] if isinstance(given, str) else given
    if names is None or names == ["none"] or names == []:
        return
    if names == ["all"]:
        yield Left("report_to", "all: log.trackers takes the names of the trackers")
    else:
        yield Setting(dotted("log.trackers"), names, ("report_to",))


def sync(switch: str, steps: str, mix: str, *, defaults: tuple[int, float]) -> Rule:
    """Return the rule for the fields of a reference that follows the policy (TR-DPO): a copy, where it can be one."""

    def make(config: Fields) -> Made:
        if not config.on(switch):
            yield from (Left(field, f"{switch} is not on") for field in config.given(steps, mix))
            return
        fields = config.given(switch, steps, mix)
        if not config.lora and not config.get("precompute_ref_log_probs"):
            yield Setting(dotted("reference.mode"), "copy", (switch,))
        table = {"every": config.whole(steps, defaults[0]), "mix": config.number(mix, defaults[1])}
        yield Setting(dotted("reference.sync"), table, fields)

    how = f"a copy that moves every `{steps}` ({defaults[0]}) steps by `{mix}` ({defaults[1]})"
    return Rule((switch, steps, mix), ("reference.mode", "reference.sync"), make, how, ("dpo", "ipo", "kto"))


def all_but(patterns: Sequence[str], *, anywhere: bool = False) -> str:
    """Return a pattern for the weights and biases whose names do not begin with one of the patterns.

    With `anywhere`, these may be anywhere in the name.
    """
    trained = "|".join(f"(?:{pattern})" for pattern in patterns)
    return rf"(?!{'.*' if anywhere else ''}(?:{trained})).*\.(?:weight|bias)"


def checkpointing(switches: tuple[str, ...], offload: str) -> Make:
    """Make the rule for fields that switch gradient checkpointing, and one that moves what it keeps to the host."""

    def make(config: Fields) -> Made:
        given = config.given(*switches)
        if config.on(offload):
            yield Setting(dotted("train.checkpointing"), True, (*given, offload))
            yield Setting(dotted("train.offload_activations"), True, (offload,))
        elif given:
            yield Setting(dotted("train.checkpointing"), any(config.on(field) for field in given), given)

    return make


def push(config: Fields) -> Made:
    if config.on("push_to_hub"):
        if "hub_model_id" in config:
            yield Setting(dotted("output.push_to"), config.text("hub_model_id"), config.given("hub_model_id"))
        else:
            yield Left("push_to_hub", 'name the repository: output.push_to = "user/name"')
    elif config.get("hub_model_id"):
        yield Left("hub_model_id", "push_to_hub is not on")


def packing(*fields: str) -> Rule:
    """Return the rule for fields that pack rows, which changes supervised steps and is for nothing else."""

    def make(config: Fields) -> Made:
        for field in config.given(*fields):
            packed = config.get(field) not in (False, None, "false")
            if packed:
                yield Left(field, PACKED if config.method == "sft" else NO_PADDING)

    return Rule(fields, (), make, "left out: `train.batch` counts rows before they are packed")


def batch(config: Fields, length: int, sequences: int) -> Made:
    """Translate the micro-batch and the steps of accumulation; a row has so many sequences of at most `length`."""
    micro = config.whole("per_device_train_batch_size", 8)
    accumulated = config.whole("gradient_accumulation_steps", 1)
    fields = ("per_device_train_batch_size", "gradient_accumulation_steps")
    words = f"per_device_train_batch_size {micro} × gradient_accumulation_steps {accumulated}"
    yield Setting(dotted("train.batch"), micro * accumulated, fields, words)
    each = f" × {sequences} completions" if sequences > 1 else ""
    words = f"per_device_train_batch_size {micro}{each} × {length} tokens"
    yield Setting(dotted("train.tokens_per_microbatch"), micro * sequences * length, fields[:1], words)
