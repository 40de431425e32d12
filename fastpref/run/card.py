"""The model card of a trained model, with its training and its held-out metrics."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fastpref import __version__
from fastpref.config import Config
from fastpref.config.paths import map_paths
from fastpref.config.toml import to_toml, toml_value
from fastpref.data.template.keywords import writes_the_date
from fastpref.data.template.text import TextRecord

_SHOWN = (
    ("eval/loss", "loss", "{:.4f}"),
    ("eval/perplexity", "perplexity", "{:.3f}"),
    ("eval/rewards/accuracies", "reward accuracy", "{:.1%}"),
    ("eval/rewards/margins", "reward margin", "{:+.4f}"),
    ("eval/rewards/kendall_tau", "Kendall's τ of rewards and scores", "{:+.4f}"),
    ("eval/logps/chosen", "log-probability of the chosen", "{:.2f}"),
    ("eval/logps/rejected", "log-probability of the rejected", "{:.2f}"),
)


def model_card(
    config: Config, rows: Iterable[Mapping[str, Any]], data_fingerprint: str, steps: int, text: TextRecord | None = None
) -> str:
    """Return the card's text. `rows` are those of metrics.jsonl. Paths of this machine are cut to their last part."""
    shown = _without_folders(config)
    base, adapter = shown.model.name, config.lora is not None
    on_hub = config.model.name == base and "/" in base
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["fastpref", config.loss.type, *(["lora"] if adapter else [])],
    )
    what = "A LoRA adapter for" if adapter else "A model fine-tuned from"
    by = "on completions to imitate" if config.loss.supervised else "by preferences"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {Path(base).name}, {config.loss.title}\n\n"
        f"{what} `{base}`, trained {by} ({config.loss.title}) with fastpref {__version__}: {steps} "
        f"steps of {config.train.batch} {config.loss.unit}s.{_started(shown)}\n\n"
        f"{_held_out(rows, 'completions' if config.loss.supervised else 'preferences')}## Data\n\n"
        f"{', '.join(f'`{d.path}`' for d in shown.data)}; the training examples' tokens have the SHA-256\n"
        f"`{data_fingerprint}`.\n\n"
        f"{_written(text, adapter)}"
        f"## Config\n\n```toml\n{to_toml(shown).strip()}\n```\n"
    )


def _started(config: Config) -> str:
    """Return a sentence on the adapter that the training began with, if there was one."""
    if config.lora is None or config.lora.start is None:
        return ""
    if config.lora.stack:
        return f" A new adapter was trained on top of `{config.lora.start}`; this is their sum, as one adapter."
    return f" The training continued the adapter `{config.lora.start}`."


def _held_out(rows: Iterable[Mapping[str, Any]], what: str) -> str:
    evaluations = [row for row in rows if "eval/loss" in row]
    if not evaluations:
        return ""
    first, last = evaluations[0], evaluations[-1]
    lines = [f"## Held-out {what}", "", f"| | step {first['step']} | step {last['step']} |", "|---|---|---|"]
    for name, words, form in _SHOWN:
        if first.get(name) is not None and last.get(name) is not None:
            lines.append(f"| {words} | {form.format(first[name])} | {form.format(last[name])} |")
    return "\n".join(lines) + "\n\n"


def _written(text: TextRecord | None, adapter: bool) -> str:
    """Return the section on how to write prompts and which tokens end an answer."""
    if text is None or not (text.ends or text.chat_template):
        return ""
    sentences = []
    if text.chat_template:
        keywords = toml_value(dict(text.chat_template_kwargs))
        sentences.append(
            "The tokenizer has the chat template of the training"
            + (f", which was given the keywords `{keywords}`" if text.chat_template_kwargs else "")
            + (f" and wrote the date {text.day}" if writes_the_date(str(text.chat_template)) else "")
            + "."
        )
    if text.ends:
        sentences.append(f"Answers end with {', '.join(f'`{token}`' for token in text.ends)}.")
        if adapter:
            sentences.append(
                "PEFT generates with the base model's settings: give it this folder's, "
                "`generation_config=GenerationConfig.from_pretrained(...)`, which have every end."
            )
    return "## Text\n\n" + "\n".join(sentences) + "\n\n"


def _without_folders(config: Config) -> Config:
    """Return the config without this machine's folders, which a published card must not show."""

    def name(text: str) -> str:
        path = Path(text).expanduser()
        return path.name if path.is_absolute() else text

    return map_paths(config, name, written=lambda _: None)
