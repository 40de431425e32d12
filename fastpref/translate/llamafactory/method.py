"""Rules for the model, its adapters, the reference and the loss."""

import re
from collections.abc import Generator
from pathlib import Path

from fastpref.config.losses import title_of
from fastpref.translate.fields import Fields, Left, Made, Setting, dotted, shown
from fastpref.translate.sources import number_of
from fastpref.translate.trainer_arguments import all_but

DEFAULT = "LLaMA-Factory's default"
_WITH_REFERENCE = ("dpo", "kto")


def dtype(config: Fields) -> Made:
    given = tuple(field for field in ("bf16", "pure_bf16", "fp16") if config.on(field))
    if "pure_bf16" in given and not config.lora:
        yield Setting(dotted("model.dtype"), "bfloat16", given, "trained weights are float32, unlike pure_bf16")
    elif "bf16" in given or "pure_bf16" in given:
        yield Setting(dotted("model.dtype"), "bfloat16", given)
    elif given and config.lora:
        yield Setting(dotted("model.dtype"), "float16", given)
    elif given:
        yield Left("fp16", "trained weights are float32, and the GPU decides which half precision it multiplies in")


def quantization(config: Fields) -> Made:
    bits = config.whole("quantization_bit", 0)
    kind = config.text("quantization_type", "nf4")
    if bits in (4, 8):
        yield Setting(dotted("model.quantization"), "nf4" if bits == 4 else "int8", ("quantization_bit",))
    elif bits:
        yield Left("quantization_bit", f"{bits} bits are not known; model.quantization is nf4 or int8")
    given = config.get("quantization_method", "bnb")
    if bits and str(given).lower() not in ("bnb", "bitsandbytes"):
        yield Left("quantization_method", f"{given}: quantised weights are bitsandbytes'")
    if bits == 4 and kind != "nf4":
        yield Left("quantization_type", f"{kind} is not known; nf4 is the same size")
    if bits == 4 and not config.on("double_quantization", True):
        yield Left("double_quantization", "nf4 always has double quantization here")


# --- Adapters --------------------------------------------------------------------------------------------------------

OWN = ("lora_rank", "lora_alpha", "lora_target", "additional_target", "use_rslora", "use_dora")
BEGINNING = ("pissa_init", "pissa_iter")
ADAPTER = ("adapter_name_or_path", "create_new_adapter")
LORA_FIELDS = (
    "finetuning_type", *OWN, "lora_dropout", *BEGINNING, "loraplus_lr_ratio", *ADAPTER,
    "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules", "use_llama_pro",
)  # fmt: skip
LORA_KEYS = (
    "lora", "lora.from", "lora.stack", "lora.rank", "lora.alpha", "lora.target", "lora.modules_to_save", "lora.rslora",
    "lora.dora", "lora.dropout", "lora.init", "lora.plus_ratio", "reference.adapter", "train.freeze",
)  # fmt: skip
NO_DROPOUT = "LLaMA-Factory turns all dropout off in the stages dpo and kto, also that of adapters"


def lora(config: Fields) -> Made:
    if config.on("use_llama_pro"):
        raise config.refused("use_llama_pro", "the layers that were added to the model cannot be told here")
    if not config.lora:
        if "adapter_name_or_path" in config:
            raise config.refused("adapter_name_or_path", f"{_kind(config)} has no adapter")
        for field in config.given(*OWN, "lora_dropout", "pissa_init", "loraplus_lr_ratio"):
            if config.get(field):
                yield Left(field, _kind(config))
        yield from _freeze(config)
        return
    yield Setting(("lora",), {}, config.given("finetuning_type"))
    yield from (Left(field, _kind(config)) for field in config.given(*FREEZE))
    continued = yield from _adapter(config)
    if continued:
        for field in config.given(*OWN):
            yield Left(field, "the adapter of adapter_name_or_path has its own")
    else:
        yield from _new(config)
    if config.method == "sft" and "lora_dropout" in config:
        yield Setting(("lora", "dropout"), config.number("lora_dropout"), ("lora_dropout",))
    elif config.get("lora_dropout"):
        yield Left("lora_dropout", NO_DROPOUT)
    if config.on("pissa_init"):
        rounds = config.whole("pissa_iter", 16)
        yield Setting(("lora", "init"), "pissa" if rounds < 0 else f"pissa_niter_{rounds}", config.given(*BEGINNING))
    elif "pissa_iter" in config:
        yield Left("pissa_iter", "pissa_init is not on")
    if "loraplus_lr_ratio" in config:
        yield Setting(("lora", "plus_ratio"), config.number("loraplus_lr_ratio"), ("loraplus_lr_ratio",))


def _kind(config: Fields) -> str:
    return f"finetuning_type: {config.text('finetuning_type', 'lora')}"


FREEZE = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")


def _freeze(config: Fields) -> Made:
    """Translate the layers that are trained, the last or the first n: all other weights are frozen."""
    if config.text("finetuning_type", "lora") != "freeze":
        yield from (Left(field, _kind(config)) for field in config.given(*FREEZE))
        return
    count = config.whole("freeze_trainable_layers", 2)
    layers = number_of(config.text("model_name_or_path"), "num_hidden_layers", (Path(), config.file.parent))
    if count > 0 and layers is None:
        why = f"the last {count} layers are trained, and how many the model has is not known; name its folder"
        raise config.refused("finetuning_type: freeze", why)
    trained = range(max(0, (layers or 0) - count), layers or 0) if count > 0 else range(min(-count, layers or -count))
    names = config.names("freeze_trainable_modules") or ["all"]
    parts = [rf"\.{at}\.{'' if name == 'all' else re.escape(name)}" for name in names for at in trained]
    parts += [re.escape(name) for name in config.names("freeze_extra_modules")]
    words = f"all but the {'last' if count > 0 else 'first'} {len(trained)} layers"
    yield Setting(dotted("train.freeze"), [all_but(parts, anywhere=True)], config.given(*FREEZE), words)


def _new(config: Fields) -> Made:
    rank, alpha = config.whole("lora_rank", 8), config.number("lora_alpha", 0)
    given = config.given("lora_rank")
    yield Setting(("lora", "rank"), rank, given, "" if given else DEFAULT)
    if alpha:
        yield Setting(("lora", "alpha"), alpha, ("lora_alpha",))
    else:
        yield Setting(("lora", "alpha"), 2 * rank, (), f"{DEFAULT}, twice the rank")
    names = config.names("lora_target") or ["all"]
    if "lora_target" in config:
        yield Setting(("lora", "target"), "all-linear" if names == ["all"] else names, ("lora_target",))
    if config.names("additional_target"):
        yield Setting(("lora", "modules_to_save"), config.names("additional_target"), ("additional_target",))
    for field, key in (("use_rslora", "rslora"), ("use_dora", "dora")):
        if field in config:
            yield Setting(("lora", key), config.on(field), (field,))


def _adapter(config: Fields) -> Generator[Setting | Left, None, bool]:
    """Translate a trained adapter. Returns whether it is trained on, and not a new one on top of it."""
    paths, new = config.names("adapter_name_or_path"), config.on("create_new_adapter")
    if not paths:
        if new:
            yield Left("create_new_adapter", "there is no adapter_name_or_path")
        return False
    if len(paths) > 1:
        why = f"{len(paths)} adapters; merge all but one into the model (`fastpref merge`), and name that one"
        raise config.refused("adapter_name_or_path", why)
    yield Setting(("lora", "from"), paths[0], ("adapter_name_or_path",))
    if new:
        yield Setting(("lora", "stack"), True, ("create_new_adapter",))
    if config.method in _WITH_REFERENCE and not config.get("ref_model"):
        words = (
            "as LLaMA-Factory, whose new adapter is on top of the merged one"
            if new
            else "as LLaMA-Factory, whose reference is the model without any adapter"
        )
        yield Setting(dotted("reference.adapter"), "start" if new else "none", (), words)
    return not new


REFERENCE = ("ref_model", "ref_model_adapters", "ref_model_quantization_bit")


def reference(config: Fields) -> Made:
    name, adapters = config.text("ref_model", ""), config.names("ref_model_adapters")
    if not name:
        yield from (Left(field, "there is no ref_model") for field in config.given(*REFERENCE[1:]))
        return
    if adapters and (len(adapters) > 1 or name != config.text("model_name_or_path")):
        raise config.refused(
            "ref_model_adapters", "a reference is a model, or one adapter of the trained model; merge them into a model"
        )
    fields = config.given(*REFERENCE[:2])
    yield Setting(dotted("reference.name"), adapters[0] if adapters else name, fields)
    bits = config.whole("ref_model_quantization_bit", 0)
    if adapters:
        if bits:
            yield Left("ref_model_quantization_bit", "an adapter shares the weights of the trained model")
        return
    if bits not in (0, 4, 8):
        raise config.refused("ref_model_quantization_bit", f"must be 4 or 8, got {bits}")
    if bits or config.get("quantization_bit"):  # without bits it is whole, though the trained model may not be
        given = config.given("ref_model_quantization_bit")
        kind = {0: "none", 4: "nf4", 8: "int8"}[bits]
        yield Setting(dotted("reference.quantization"), kind, given, "" if given else DEFAULT)


# --- The losses ------------------------------------------------------------------------------------------------------


def loss(config: Fields) -> Made:
    given = config.given("stage", *(() if config.method in ("kto", "sft") else ("pref_loss",)))
    if config.method in ("kto", "sft") and "pref_loss" in config:
        yield Left("pref_loss", f"means nothing to {config.called}")
    yield Setting(dotted("loss.type"), config.method, given, "" if given else DEFAULT)
    variant = config.text("pref_loss", "sigmoid") if config.method == "dpo" else "sigmoid"
    tuned = config.number("pref_ftx", 0)
    if config.method == "dpo" and (variant != "sigmoid" or tuned):
        names = [variant, "sft"] if tuned else [variant]
        yield Setting(dotted("loss.variants"), names, config.given("pref_loss", *(("pref_ftx",) if tuned else ())))
    if tuned and config.method == "dpo":
        words = "pref_ftx; the mean over all tokens, LLaMA-Factory's is that of each pair's mean"
        yield Setting(dotted("loss.weights"), [1.0, tuned], ("pref_ftx",), words)
    elif tuned and config.method == "simpo":
        yield Setting(dotted("loss.sft_weight"), tuned, ("pref_ftx",))
    elif tuned:
        yield Left("pref_ftx", f"{title_of(config.method)} has no further supervised term")


def beta(config: Fields) -> Made:
    given = config.given("pref_beta")
    if given or config.method == "simpo":  # SimPO's default is another one here
        yield Setting(dotted("loss.beta"), config.number("pref_beta", 0.1), given, "" if given else DEFAULT)


def simpo(config: Fields) -> Made:
    given = config.given("simpo_gamma")
    yield Setting(dotted("loss.gamma"), config.number("simpo_gamma", 0.5), given, "" if given else DEFAULT)


def smoothing(config: Fields) -> Made:
    if config.number("dpo_label_smoothing", 0):
        yield Setting(dotted("loss.label_smoothing"), config.number("dpo_label_smoothing"), ("dpo_label_smoothing",))


def lengths(config: Fields) -> Made:
    if "ld_alpha" in config:
        words = "ld_alpha; it weighs the reference's tokens too, LLaMA-Factory's only the policy's"
        yield Setting(dotted("loss.length_alpha"), config.number("ld_alpha"), ("ld_alpha",), words)


def classifier(config: Fields) -> Made:
    weight = config.number("pref_bco_weight", 0)
    if weight > 0:
        shares = [round(1 / (1 + weight), 6), round(weight / (1 + weight), 6)]
        yield Left(
            "pref_bco_weight",
            "it compares rewards with their running mean, which no loss here does; the nearest is loss.variants = "
            f'["sigmoid", "bco_pair"] with loss.weights = {shown(shares)}',
        )
