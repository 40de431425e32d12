"""Rules for the model, its adapters and the loss."""

from collections.abc import Callable
from typing import Any

from fastpref.axolotl.source import Axolotl, Left, Made, Setting, dotted, shown
from fastpref.config import is_pattern


def quantization(config: Axolotl) -> Made:
    dtype = config.get("peft.weight_dtype")
    four = config.on("load_in_4bit") or dtype in ("nf4", "int4") or config.get("adapter") == "qlora"
    if four or config.on("load_in_8bit") or dtype == "int8":
        fields = config.given("adapter", "load_in_4bit", "load_in_8bit", "peft.weight_dtype")
        yield Setting(dotted("model.quantization"), "nf4" if four else "int8", fields)
    if dtype == "int4":
        yield Left("peft.weight_dtype", "int4 is not known; nf4 is the same size and closer to the weights")
    if config.get("peft.backend", "bnb") != "bnb":
        yield Left("peft.backend", "quantised weights are bitsandbytes'")


def dtype(config: Axolotl) -> Made:
    fields = config.given("bf16", "fp16", "bfloat16", "float16", "float32")
    bf16, fp16 = config.get("bf16", "auto"), config.get("fp16", False)
    if bf16 in (True, "full") or config.on("bfloat16"):
        yield Setting(dotted("model.dtype"), "bfloat16", fields)
    elif (fp16 or config.on("float16")) and config.lora:
        yield Setting(dotted("model.dtype"), "float16", fields)
    elif fp16 or config.on("float16"):
        why = "trained weights are float32, and the GPU decides which half precision it multiplies in"
        yield from (Left(field, why) for field in fields if config.get(field))
    elif bf16 is False or config.on("float32"):
        yield Setting(dotted("model.dtype"), "float32", fields)
    elif bf16 != "auto":
        why = f"{shown(bf16)} is neither true, false, full nor auto; the precision is chosen for the device"
        yield Left("bf16", why)


LIGER = (
    "liger_rope", "liger_rms_norm", "liger_rms_norm_gated", "liger_layer_norm", "liger_glu_activation", "liger_swiglu",
)  # fmt: skip


def liger(config: Axolotl) -> Made:
    fields = tuple(field for field in LIGER if config.on(field))
    if fields:
        yield Setting(dotted("model.liger"), "auto", fields)


LORA: dict[str, tuple[str, Callable[[Axolotl, str], Any]]] = {  # field → key of [lora], and how its value is read
    "lora_r": ("rank", Axolotl.whole),
    "lora_alpha": ("alpha", Axolotl.number),
    "lora_dropout": ("dropout", Axolotl.number),
    "lora_modules_to_save": ("modules_to_save", Axolotl.get),
    "peft_use_dora": ("dora", Axolotl.on),
    "peft_use_rslora": ("rslora", Axolotl.on),
}
TARGETS = ("lora_target_linear", "lora_target_modules")


def lora(config: Axolotl) -> Made:
    if not config.lora:
        for field in config.given(*LORA, *TARGETS):
            if config.get(field):
                yield Left(field, "there is no adapter:, so the whole model is trained")
        return
    yield Setting(("lora",), {}, ("adapter",))
    for field, (key, read) in LORA.items():
        if field in config:
            yield Setting(("lora", key), read(config, field), (field,))
    yield from targets(config)


def targets(config: Axolotl) -> Made:
    modules = config.get("lora_target_modules")
    if config.on("lora_target_linear"):
        yield Setting(("lora", "target"), "all-linear", ("lora_target_linear",))
        if modules:
            why = 'lora.target = "all-linear" already takes every linear module but the head'
            yield Left("lora_target_modules", why)
    elif modules:  # a string is a regular expression, as for PEFT, or one name
        one = isinstance(modules, str) and modules != "all-linear" and not is_pattern(modules)
        yield Setting(("lora", "target"), [modules] if one else modules, ("lora_target_modules",))


def beta(config: Axolotl) -> Made:
    fields = config.given("trl.beta", "rl_beta", "dpo_beta", *(("orpo_alpha",) if config.method == "orpo" else ()))
    if fields:
        yield Setting(dotted("loss.beta"), config.number(fields[0]), (fields[0],))
    elif config.method == "simpo":  # the defaults of the two libraries differ
        yield Setting(dotted("loss.beta"), 0.1, (), "TRL's default")
    for field in fields[1:]:
        yield Left(field, f"{fields[0]} goes before it")
    if "orpo_alpha" in config and config.method != "orpo":
        yield Left("orpo_alpha", f"means nothing to rl: {config.method}")


def variants(config: Axolotl) -> Made:
    given = config.get("dpo_loss_type", ["sigmoid"])
    names = given if isinstance(given, list) else [given]
    weights = config.get("dpo_loss_weights")
    weights = weights if weights is None or isinstance(weights, list) else [weights]
    fields = list(config.given("dpo_loss_type"))
    if config.on("dpo_norm_loss"):
        if "sigmoid" in names:
            names = ["sigmoid_norm" if name == "sigmoid" else name for name in names]
            fields.append("dpo_norm_loss")
        else:
            yield Left("dpo_norm_loss", "only the variant sigmoid has a form for averages per token")
    weight_fields = list(config.given("dpo_loss_weights"))
    if config.number("rpo_alpha", 0) and "sft" not in names:
        weights = [*(weights or [1.0] * len(names)), config.number("rpo_alpha")]
        names = [*names, "sft"]
        fields.append("rpo_alpha")
        weight_fields.append("rpo_alpha")
    elif config.number("rpo_alpha", 0):
        yield Left("rpo_alpha", "dpo_loss_type has sft already; dpo_loss_weights give its weight")
    rate = config.number("dpo_label_smoothing", 0)
    smoothing = [Setting(dotted("loss.label_smoothing"), rate, ("dpo_label_smoothing",))] if rate else []
    chosen = [Setting(dotted("loss.variants"), names, tuple(fields))] if fields else []
    # exo_pair needs smoothing and ipo refuses it; the setting that the user named has priority
    yield from [*smoothing, *chosen] if "exo_pair" in names else [*chosen, *smoothing]
    if weights is not None:
        yield Setting(dotted("loss.weights"), weights, tuple(weight_fields))
    if "dpo_use_weighting" in config:
        yield Setting(dotted("loss.weighting"), config.on("dpo_use_weighting"), ("dpo_use_weighting",))


def simpo(config: Axolotl) -> Made:
    gamma, sft = config.given("simpo_gamma"), config.given("cpo_alpha")
    yield Setting(dotted("loss.gamma"), config.number("simpo_gamma", 0.5), gamma, "" if gamma else "TRL's default")
    yield Setting(dotted("loss.sft_weight"), config.number("cpo_alpha", 1.0), sft, "" if sft else "TRL's default")


def orpo(config: Axolotl) -> Made:
    yield Setting(dotted("loss.nll_on"), "all", (), "as TRL's trainer: the prompt is learned too")


def revision(config: Axolotl) -> Made:
    fields = config.given("revision_of_model", "model_revision")
    if fields:
        yield Setting(dotted("model.revision"), config.text(fields[0]), fields)
