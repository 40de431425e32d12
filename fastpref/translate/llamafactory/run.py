"""Rules for tokens, the optimizer and the end of a run."""

from fastpref.data.template.named import KNOWN
from fastpref.translate.fields import Fields, Left, Made, Setting, dotted
from fastpref.translate.trainer_arguments import NOT_BEST, metric_name
from fastpref.translate.trainer_arguments import batch as shared_batch
from fastpref.translate.trainer_arguments import optimizer as shared_optimizer

LENGTH = 2048
SAME = ("llama3", "chatml", "gemma")
"""LLaMA-Factory's templates that the one of the same name here writes alike."""


def template(config: Fields) -> Made:
    name = config.text("template", "")
    if name in SAME and name in KNOWN:
        yield Setting(dotted("tokens.chat_template"), name, ("template",))
    elif name not in ("", "default", "empty"):
        yield Left("template", f"{name}: the tokenizer's own chat template is used; a file of Jinja can be named")
    elif name:
        yield Left("template", f"{name}: the tokenizer's own chat template is used")


def batch(config: Fields) -> Made:
    sequences = 1 if config.method == "sft" else 2
    yield from shared_batch(config, config.whole("cutoff_len", LENGTH), sequences)


OTHERS = {
    "use_muon": "muon", "use_galore": "galore", "use_apollo": "apollo", "use_badam": "badam",
    "use_adam_mini": "adam_mini",
}  # fmt: skip


def optimizer(config: Fields) -> Made:
    chosen = [field for field in OTHERS if config.on(field)]
    if chosen:
        yield Setting(dotted("train.optimizer"), OTHERS[chosen[0]], (chosen[0],))
        if "optim" in config:
            yield Left("optim", f"{chosen[0]} goes before it")
    else:
        yield from shared_optimizer("optim")(config)


def checkpointing(config: Fields) -> Made:
    if config.on("disable_gradient_checkpointing"):
        yield Setting(dotted("train.checkpointing"), False, ("disable_gradient_checkpointing",))


STOP = ("early_stopping_steps", "metric_for_best_model", "load_best_model_at_end")


def stop(config: Fields) -> Made:
    if config.whole("early_stopping_steps", 0):
        metric = metric_name(config.text("metric_for_best_model", "loss"))
        table = {"after": config.whole("early_stopping_steps"), "metric": metric}
        yield Setting(dotted("train.stop"), table, config.given(*STOP[:2]))
        return
    if config.get("metric_for_best_model"):
        yield Left("metric_for_best_model", "checkpoints/best.json names the best checkpoint by the evaluation's loss")
    if config.get("load_best_model_at_end"):
        yield Left("load_best_model_at_end", NOT_BEST)


def new_tokens(config: Fields) -> Made:
    fields = config.given("add_tokens", "add_special_tokens")
    names = [name for field in fields for name in config.names(field)]
    if names:
        yield Setting(dotted("tokens.add"), names, fields, "only their rows are trained")
