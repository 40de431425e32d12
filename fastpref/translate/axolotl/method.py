"""Rules for the model, its adapters and the loss."""

from collections.abc import Callable
from typing import Any

from fastpref.config import is_pattern
from fastpref.translate.fields import Fields, Left, Made, Setting, dotted, shown


def quantization(config: Fields) -> Made:
    dtype = config.get("peft.weight_dtype")
    four = config.on("load_in_4bit") or dtype in ("nf4", "int4") or config.get("adapter") == "qlora"
    if four or config.on("load_in_8bit") or dtype == "int8":
        fields = config.given("adapter", "load_in_4bit", "load_in_8bit", "peft.weight_dtype")
        yield Setting(dotted("model.quantization"), "nf4" if four else "int8", fields)
    if dtype == "int4":
        yield Left("peft.weight_dtype", "int4 is not known; nf4 is the same size and closer to the weights")
    if config.get("peft.backend", "bnb") != "bnb":
        yield Left("peft.backend", "quantised weights are bitsandbytes'")


def dtype(config: Fields) -> Made:
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


def liger(config: Fields) -> Made:
    fields = tuple(field for field in LIGER if config.on(field))
    if fields:
        yield Setting(dotted("model.liger"), "auto", fields)


LORA: dict[str, tuple[str, Callable[[Fields, str], Any]]] = {  # field → key of [lora], and how its value is read
    "lora_r": ("rank", Fields.whole),
    "lora_alpha": ("alpha", Fields.number),
    "lora_modules_to_save": ("modules_to_save", Fields.get),
    "peft_use_dora": ("dora", Fields.on),
    "peft_use_rslora": ("rslora", Fields.on),
}
TARGETS = ("lora_target_linear", "lora_target_modules")
_MORE = {  # field → key of [lora], with lora_model_dir too
    "loraplus_lr_ratio": ("plus_ratio", Fields.number),
    "peft_layers_to_transform": ("layers", Fields.get),
}
LORA_FIELDS = (
    "adapter", "lora_model_dir", *LORA, *TARGETS, "lora_dropout", *_MORE, "peft_init_lora_weights", "peft.loftq_config",
)  # fmt: skip
LORA_KEYS = (
    "lora", "lora.from", *(f"lora.{key}" for key, _ in LORA.values()), "lora.target", "lora.dropout",
    *(f"lora.{key}" for key, _ in _MORE.values()), "lora.init",
)  # fmt: skip


def lora(config: Fields) -> Made:
    if not config.lora:
        for field in config.given(*LORA_FIELDS):
            if config.get(field):
                yield Left(field, "there is no adapter:, so the whole model is trained")
        return
    yield Setting(("lora",), {}, ("adapter",))
    if config.get("lora_model_dir"):
        yield Setting(("lora", "from"), config.text("lora_model_dir"), ("lora_model_dir",))
        for field in config.given(*LORA, *TARGETS):
            yield Left(field, "the adapter of lora_model_dir has its own")
    else:
        for field, (key, read) in LORA.items():
            if field in config:
                yield Setting(("lora", key), read(config, field), (field,))
        yield from targets(config)
    if config.method == "sft" or not config.get("lora_dropout"):
        if "lora_dropout" in config:
            yield Setting(("lora", "dropout"), config.number("lora_dropout"), ("lora_dropout",))
    else:
        yield Left("lora_dropout", NO_DROPOUT)
    for field, (key, read) in _MORE.items():
        if field in config:
            yield Setting(("lora", key), read(config, field), (field,))
    yield from beginning(config)


NO_DROPOUT = (
    "TRL turns all dropout off in preference training, also that of adapters (disable_dropout); lora.dropout does not"
)


def targets(config: Fields) -> Made:
    modules = config.get("lora_target_modules")
    if config.on("lora_target_linear"):
        yield Setting(("lora", "target"), "all-linear", ("lora_target_linear",))
        if modules:
            why = 'lora.target = "all-linear" already takes every linear module but the head'
            yield Left("lora_target_modules", why)
    elif modules:
        yield Setting(("lora", "target"), target(modules), ("lora_target_modules",))


def target(modules: Any) -> Any:
    """Return what PEFT's target_modules mean: a text is a regular expression, one name, or "all-linear"."""
    one = isinstance(modules, str) and modules != "all-linear" and not is_pattern(modules)
    return [modules] if one else modules


def beginning(config: Fields) -> Made:
    """Translate how the weights of new adapters begin; peft_init_lora_weights goes before LoftQ."""
    bits = config.table("peft.loftq_config").get("loftq_bits")
    given = config.get("peft_init_lora_weights")
    if given is False:
        yield Left("peft_init_lora_weights", "random weights from the start are for tests; adapters begin at zero")
    elif given not in (None, True):
        yield Setting(("lora", "init"), given, ("peft_init_lora_weights",))
    elif bits == 4:
        yield Setting(("lora", "init"), "loftq", ("peft.loftq_config",))
    elif bits:
        yield Left("peft.loftq_config", f"LoftQ has 4 bits here, not {shown(bits)}")


def loss(config: Fields) -> Made:
    words = "" if "rl" in config else "no rl:, and conversations whose assistant turns are trained on"
    yield Setting(dotted("loss.type"), config.method, config.given("rl"), words)


def kto_weight(field: str, key: str) -> Callable[[Fields], Made]:
    def make(config: Fields) -> Made:
        if field in config:
            weight = config.number(field)
            yield Setting(dotted(key), weight or 1.0, (field,), "" if weight else f"{field}: Axolotl takes 0 for 1")

    return make


def sync(config: Fields) -> Made:
    """Translate the reference that follows the policy (TR-DPO)."""
    if config.on("trl.sync_ref_model"):
        every = config.whole("trl.ref_model_sync_steps", 64)
        mix = config.number("trl.ref_model_mixup_alpha", 0.9)
        yield Setting(dotted("reference.sync"), {"every": every, "mix": mix}, config.given(*SYNC))
    else:
        yield from (Left(field, "trl.sync_ref_model is not on") for field in config.given(*SYNC[1:]))


SYNC = ("trl.sync_ref_model", "trl.ref_model_sync_steps", "trl.ref_model_mixup_alpha")


def beta(config: Fields) -> Made:
    fields = config.given("trl.beta", "rl_beta", "dpo_beta", *(("orpo_alpha",) if config.method == "orpo" else ()))
    if fields:
        yield Setting(dotted("loss.beta"), config.number(fields[0]), (fields[0],))
    elif config.method == "simpo":  # the defaults of the two libraries differ
        yield Setting(dotted("loss.beta"), 0.1, (), "TRL's default")
    for field in fields[1:]:
        yield Left(field, f"{fields[0]} goes before it")
    if "orpo_alpha" in config and config.method != "orpo":
        yield Left("orpo_alpha", f"means nothing to {config.called}")


def variants(config: Fields) -> Made:
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


def simpo(config: Fields) -> Made:
    gamma, sft = config.given("simpo_gamma"), config.given("cpo_alpha")
    yield Setting(dotted("loss.gamma"), config.number("simpo_gamma", 0.5), gamma, "" if gamma else "TRL's default")
    yield Setting(dotted("loss.sft_weight"), config.number("cpo_alpha", 1.0), sft, "" if sft else "TRL's default")


def orpo(config: Fields) -> Made:
    yield Setting(dotted("loss.nll_on"), "all", (), "as TRL's trainer: the prompt is learned too")


def revision(config: Fields) -> Made:
    fields = config.given("revision_of_model", "model_revision")
    if fields:
        yield Setting(dotted("model.revision"), config.text(fields[0]), fields)
