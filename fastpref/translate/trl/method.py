"""Rules for the model, its adapters and the loss."""

import json
from pathlib import Path
from typing import Any

from fastpref.translate.fields import Fields, Left, Made, Setting, dotted, shown
from fastpref.translate.trl.source import inferred

DEFAULT = "TRL's default"


def loss(config: Fields) -> Made:
    if "--loss" in config:
        words = "as --loss says"
    else:
        method, field = inferred(config.values)
        sign = f"{field} is in the file" if field else "the file does not say"
        words = f"{sign}, so `trl {method}` is taken; --loss names another command"
    yield Setting(dotted("loss.type"), config.method, (), words)


def dtype(config: Fields) -> Made:
    """Translate the dtype of the weights, and the precision of matrix products."""
    weights = config.text("dtype", "float32")
    fp16, bf16 = config.on("fp16"), config.on("bf16", not config.on("fp16"))
    given = config.given("dtype", "bf16", "fp16")
    if weights not in ("float32", "auto", "bfloat16", "float16"):
        yield Left("dtype", f"{shown(weights)} is not one of auto, float32, bfloat16 and float16")
    elif weights in ("bfloat16", "float16"):
        half = "" if config.lora else "trained weights are float32 here, and products have half precision"
        if weights == "bfloat16" or config.lora:
            yield Setting(dotted("model.dtype"), weights, given, half)
        else:
            yield Left("dtype", half)
    elif fp16 and config.lora:
        yield Setting(dotted("model.dtype"), "float16", given)
    elif fp16:
        yield Left("fp16", "trained weights are float32, and the GPU decides which half precision it multiplies in")
    elif not bf16:
        yield Setting(dotted("model.dtype"), "float32", given)
    elif "bf16" in config and config.lora:
        yield Setting(dotted("model.dtype"), "bfloat16", given)


def quantization(config: Fields) -> Made:
    four, eight = config.on("load_in_4bit"), config.on("load_in_8bit")
    given = config.given("load_in_4bit", "load_in_8bit")
    if four or eight:
        yield Setting(dotted("model.quantization"), "nf4" if four else "int8", given)
    kind = config.text("bnb_4bit_quant_type", "nf4")
    if four and kind != "nf4":
        yield Left("bnb_4bit_quant_type", f"{kind} is not known; nf4 is the same size")
    if four and not config.on("use_bnb_nested_quant"):
        yield Left("use_bnb_nested_quant", "nf4 always has double quantization here, which TRL has only if this is on")


LORA = {  # field → key of [lora], how its value is read, and TRL's default where it is another one
    "lora_r": ("rank", Fields.whole),
    "lora_alpha": ("alpha", Fields.number),
    "lora_modules_to_save": ("modules_to_save", Fields.get),
    "use_rslora": ("rslora", Fields.on),
    "use_dora": ("dora", Fields.on),
}
LORA_FIELDS = ("use_peft", *LORA, "lora_target_modules", "lora_dropout", "disable_dropout")
LORA_KEYS = ("lora", *(f"lora.{key}" for key, _ in LORA.values()), "lora.target", "lora.dropout")
NO_DROPOUT = "disable_dropout, on by default, turns off the dropout of adapters too; set lora.dropout to have it"


def lora(config: Fields) -> Made:
    if not config.lora:
        for field in config.given(*LORA_FIELDS):
            if config.get(field) and field != "disable_dropout":
                yield Left(field, "use_peft is not on, so the whole model is trained")
    else:
        yield Setting(("lora",), {}, ("use_peft",))
        for field, (key, read) in LORA.items():
            if field in config:
                yield Setting(("lora", key), read(config, field), (field,))
        yield from _targets(config)
        if config.method == "sft" or not config.on("disable_dropout", True):
            given = config.given("lora_dropout")
            words = "" if given else DEFAULT
            yield Setting(("lora", "dropout"), config.number("lora_dropout", 0.05), given, words)
        elif config.get("lora_dropout"):
            yield Left("lora_dropout", NO_DROPOUT)
    if "disable_dropout" in config and not config.on("disable_dropout"):
        yield Left("disable_dropout", "only adapters have dropout here (lora.dropout); that of the model stays off")


def _targets(config: Fields) -> Made:
    given = config.get("lora_target_modules")
    names = given[0] if isinstance(given, list) and len(given) == 1 else given
    if names:
        target = names if isinstance(names, list) or names == "all-linear" else pattern_or_name(names)
        yield Setting(("lora", "target"), target, ("lora_target_modules",))
        return
    family = _family(config.text("model_name_or_path"), (Path(), config.file.parent))
    names, known = _DEFAULT_TARGETS.get(family or "", _USUAL), family in _DEFAULT_TARGETS
    words = (
        f"PEFT's default for {family}"
        if known
        else "PEFT's default for most models: TRL takes that of the architecture, which is not known here"
    )
    yield Setting(("lora", "target"), list(names), (), words)


def pattern_or_name(names: Any) -> Any:
    """Return a text of target_modules as a list with the name, or the regular expression as it is."""
    from fastpref.config import is_pattern

    return names if isinstance(names, str) and is_pattern(names) else [names]


_USUAL = ("q_proj", "v_proj")
_DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {  # model_type → what PEFT 0.21 adapts if no module is named
    **dict.fromkeys(
        ("opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm", "gemma", "gemma2",
         "gemma3_text", "qwen2", "qwen3"), _USUAL,
    ),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "falcon", "RefinedWeb", "RefinedWebModel"), ("query_key_value",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "mpt": ("Wqkv",),
    "codegen": ("qkv_proj",),
    "btlm": ("c_proj", "c_attn"),
}  # fmt: skip


def _family(name: str, folders: tuple[Path, ...]) -> str | None:
    """Return the model_type of a model in a folder here, or None."""
    for folder in folders:
        try:
            family = json.loads((folder / name / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            continue
        return family if isinstance(family, str) else None
    return None


# --- The losses ------------------------------------------------------------------------------------------------------

_DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


def dpo(config: Fields) -> Made:
    names = config.names("loss_type") if "loss_type" in config else ["sigmoid"]
    yield from _smoothing(config, names)
    if "loss_type" in config:
        yield Setting(dotted("loss.variants"), names, ("loss_type",))
    if "loss_weights" in config:
        weights = config.get("loss_weights")
        yield Setting(dotted("loss.weights"), weights if isinstance(weights, list) else [weights], ("loss_weights",))


def _smoothing(config: Fields, names: list[str]) -> Made:
    """Translate label_smoothing, which TRL applies to fewer losses than fastpref."""
    rate = config.number("label_smoothing", 0)
    smoothed = [name for name in names if name in _SMOOTHED]
    if rate and not smoothed:
        yield Left("label_smoothing", f"TRL applies it to {', '.join(_SMOOTHED)} only, and so not here")
    elif rate and "sigmoid" in names:
        yield Left("label_smoothing", f"it would smooth sigmoid too, which TRL does not; {', '.join(smoothed)} need it")
    elif rate:
        yield Setting(dotted("loss.label_smoothing"), rate, ("label_smoothing",))


def divergence(config: Fields) -> Made:
    if "f_divergence_type" in config:
        name = config.text("f_divergence_type")
        yield Setting(dotted("loss.f_divergence"), _DIVERGENCES.get(name, name), ("f_divergence_type",))
    if "f_alpha_divergence_coef" in config:
        value = config.number("f_alpha_divergence_coef")
        yield Setting(dotted("loss.f_alpha"), value, ("f_alpha_divergence_coef",))


def kto(config: Fields) -> Made:
    name = config.text("loss_type", "kto")
    if name == "apo_zero_unpaired":
        yield Setting(dotted("loss.kl"), "none", ("loss_type",))
    elif name != "kto":
        yield Left("loss_type", f"{name}: `trl kto` has kto and apo_zero_unpaired")


def sft(config: Fields) -> Made:
    if config.text("loss_type", "nll") not in ("nll", "chunked_nll"):
        yield Left("loss_type", f"{config.text('loss_type')}: the loss is the negative log-likelihood")
    if "completion_only_loss" in config and not config.on("completion_only_loss"):
        yield Left("completion_only_loss", "prompts are not trained on")
    if not config.on("assistant_only_loss") and not config.on("completion_only_loss"):
        yield Left(
            "assistant_only_loss",
            "TRL trains on the whole of a conversation in `messages` unless this is on; here only the assistant's "
            "words are. Rows of a prompt and a completion are the same in both",
        )


def reference(config: Fields) -> Made:
    if config.on("precompute_ref_log_probs"):
        yield Setting(dotted("reference.mode"), "precompute", ("precompute_ref_log_probs",))


SYNC = ("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha")


def sync(config: Fields) -> Made:
    """Translate the reference that follows the policy (TR-DPO)."""
    if config.on("sync_ref_model"):
        table = {
            "every": config.whole("ref_model_sync_steps", 512), "mix": config.number("ref_model_mixup_alpha", 0.6),
        }  # fmt: skip
        yield Setting(dotted("reference.sync"), table, config.given(*SYNC))
    else:
        yield from (Left(field, "sync_ref_model is not on") for field in config.given(*SYNC[1:]))
