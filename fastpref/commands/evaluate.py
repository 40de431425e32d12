"""`fastpref eval`: metrics of a model on held-out rows, and its distance from the model it began with."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table

from fastpref.config import Config
from fastpref.config.losses import KTO, SimPO
from fastpref.data.batch import PreferenceBatch, collate, plan_microbatches
from fastpref.data.cache import load_examples
from fastpref.data.example import Example
from fastpref.data.table import Examples
from fastpref.errors import UserError
from fastpref.model.adapters.source import reference_kind
from fastpref.model.adapters.switch import only
from fastpref.model.limits import compare, limits_of_model, pad_token
from fastpref.model.load import Loaded
from fastpref.model.policy import Policy
from fastpref.run.trained import Trained, find_trained, load_trained, trained_tokenizer
from fastpref.step.objective import Objective
from fastpref.step.reference import Reference

Context = Callable[[], AbstractContextManager[Any]]
_LOGITS = 1 << 24  # float32 logits of a distribution at once


def evaluate(
    trained: Trained,
    *,
    data: str | None = None,
    reference: Trained | None = None,
    cache: bool = True,
    tell: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Return metrics over held-out examples under the names of metrics.jsonl, and these:

        logps/accuracies  how often the chosen completion is the likelier one, per token (of pairs and lists)
        reference/kl      KL(model ‖ reference) of the next token, nats, a mean over the completions' tokens

    The examples are those of the config's [eval], or of the file `data`. The reference is the model that the training
    began with, unless another is given; without one, KL and the rewards that need it are left out. A loss without a
    reference has its own rewards and margins, and the reference is compared by KL only. `tell` is called
    with each note on loading the models. Raises UserError.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples = _examples(trained, data, cache)
    try:
        loaded = load_trained(trained, device, reference=reference is None)
    except UserError as error:
        if not str(error).startswith(("lora.from", "reference.name")):
            raise
        raise UserError(f"{error}\nThe run compared with that adapter; name another model with --reference") from None
    if reference is None and trained.is_adapter and reference_kind(trained.config) == "model":
        reference = find_trained(str(trained.config.reference.name))
    other, off = _reference(trained, loaded, reference, device)
    for note in loaded.notes:
        tell(note)
    if reference is None:
        for note in _other_references(trained.config):
            tell(note)
    for note in other.notes if other is not None else ():
        if note not in loaded.notes:
            tell(f"the reference: {note}")
    tokenizer, config = trained_tokenizer(trained), trained.config
    for model in (loaded, other or loaded):
        compare(limits_of_model(model.model), {"held-out": examples}, tokenizer, config)
    compared = None if other is None else other.policy.eval()
    uses_reference = config.loss.uses_reference
    lacks_reference = uses_reference and compared is None
    options, own = config.loss, None
    if uses_reference and compared is not None:
        own = _logps(compared, off)
    elif lacks_reference and options.listwise:  # metrics that do not depend on the reference are those of any
        own = _no_logps
    elif lacks_reference:
        options = SimPO()
    objective = Objective(
        policy=loaded.policy.eval(),
        reference=own,
        options=options,
        layout=loaded.layout if other is None or other.layout == loaded.layout else "padded",  # all models take it
        budget=config.tokens_per_microbatch,
        pad_token_id=pad_token(tokenizer, limits_of_model(loaded.model))[0],
        device=device,
    )
    metrics: dict[str, Any] = {"examples": len(examples)}
    if not (lacks_reference and isinstance(config.loss, KTO)):
        metrics |= objective.evaluate(examples, config.train.batch).result()
    if lacks_reference:
        metrics = {name: value for name, value in metrics.items() if not name.startswith(("rewards/", "loss"))}
    if compared is not None:
        metrics["reference/kl"] = _mean_kl(objective, loaded.policy, compared, off, examples)
    return metrics


def _other_references(config: Config) -> Iterator[str]:
    """Yield notes on runs whose reference is not the one that is compared with by default."""
    if config.reference.sync is not None:
        yield "reference.sync: the run has moved its reference; this compares with the model that it began with"
    if config.lora is not None and config.lora.init == "loftq" and config.loss.uses_reference:
        yield "lora.init: the reference of the run had the first values of the adapters; this compares without adapters"


def show(metrics: dict[str, Any], name: str, *, as_json: bool) -> None:
    """Print the most important metrics as a table, or all of them as JSON."""
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    for key, words, form in (
        ("rewards/accuracies", "accuracy", "{:.1%}"),
        ("logps/accuracies", "the chosen is likelier", "{:.1%}"),
        ("rewards/margins", "reward margin", "{:+.3f}"),
        ("rewards/kendall_tau", "Kendall's τ of rewards and scores", "{:+.3f}"),
        ("reference/kl", "KL to the reference, nats a token", "{:.4f}"),
        ("loss", "loss", "{:.4f}"),
        ("perplexity", "perplexity", "{:.3f}"),
        ("logps/chosen", "log-probability of the chosen", "{:.1f}"),
        ("logps/rejected", "log-probability of the rejected", "{:.1f}"),
        ("entropy", "entropy, nats a token", "{:.3f}"),
    ):
        if key in metrics:
            extra = ""
            if key.endswith("accuracies"):
                low, high = interval(metrics[key], metrics["examples"])
                extra = f"95 % interval {low:.1%} to {high:.1%}"
            table.add_row(words, form.format(metrics[key]), extra)
    console = Console(highlight=False)
    console.print(f"{name}: {metrics['examples']:,} held-out examples", markup=False, soft_wrap=True)
    console.print(table)


def interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's confidence interval of a share of `count` trials (Wilson 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _examples(trained: Trained, data: str | None, cache: bool) -> Examples:
    config = trained.config
    if data is not None:
        config = config.but({"data": [{"path": data}], "eval": {}})
    elif not trained.of_run:
        there = Path(trained.weights).exists()
        known = "no run is known of it" if there else "no such folder is here, and no run is known of a name on the hub"
        raise UserError(f"{trained.weights}: {known}; name the preferences to evaluate it on: --data FILE")
    elif not config.eval.wanted:
        raise UserError("the run held out no rows (eval.fraction, [[eval.data]]); name a file: --data FILE")
    day = trained.text.day if trained.text is not None else None
    tokenized = load_examples(config, trained_tokenizer(trained), cache=cache, day=day)
    return tokenized.train if data is not None else tokenized.heldout


def _reference(
    trained: Trained, loaded: Loaded, named: Trained | None, device: torch.device
) -> tuple[Loaded | None, Context]:
    """Return the reference, and the context to compute it in. Raises UserError if its vocabulary differs."""
    if named is not None:
        if added := trained.config.tokens.add:  # the model that a run began with has no rows for its tokens
            named = replace(named, config=named.config.but({"tokens.add": added}))
        other = load_trained(named, device)
        if other.policy.head.vocabulary != loaded.policy.head.vocabulary:
            raise UserError(
                f"--reference {named.weights}: it has {other.policy.head.vocabulary:,} tokens and {trained.weights} "
                f"{loaded.policy.head.vocabulary:,}; only models with the same tokens can be compared"
            )
        return other, nullcontext
    if isinstance(loaded.wrapped, peft.PeftModel):
        return loaded, partial(only, loaded.model, loaded.reference.names)
    if trained.began_with is not None:
        return load_trained(trained, device, base=True), nullcontext
    return None, nullcontext


def _logps(policy: Policy, off: Context) -> Reference:
    def logps(batch: PreferenceBatch) -> torch.Tensor:
        with torch.no_grad(), off():
            return policy(batch).logp

    return logps


def _no_logps(batch: PreferenceBatch) -> torch.Tensor:
    return torch.zeros(len(batch.segments), device=batch.segments.device)


@torch.no_grad()
def _mean_kl(
    objective: Objective, policy: Policy, compared: Policy, off: Context, examples: Sequence[Example]
) -> float:
    """Return the mean KL(policy ‖ compared) of the next token over the completions' tokens, in nats."""
    kl, tokens = 0.0, 0
    for start in range(0, len(examples), 256):
        some = examples[start : start + 256]
        for places in plan_microbatches(some, objective.layout, objective.budget):
            batch = collate([some[i] for i in places], objective.layout, pad_token_id=objective.pad_token_id)
            batch = batch.to(objective.device)
            kl += _kl(policy, compared, off, batch)
            tokens += len(batch.segments)
    return kl / tokens


def _kl(policy: Policy, compared: Policy, off: Context, batch: PreferenceBatch) -> float:
    """Return KL(policy ‖ compared) of the next token, summed over the places that predict a scored token."""
    predictors = batch.of_tokens(batch.predictors)
    own = policy.hidden_states(batch)[predictors]
    with off():
        other = compared.hidden_states(batch)[predictors]
    rows, total = max(1, _LOGITS // policy.head.vocabulary), 0.0
    for mine, theirs in zip(own.split(rows), other.split(rows)):
        logp = policy.head.logits(mine).log_softmax(-1)
        with off():
            reference = compared.head.logits(theirs).log_softmax(-1)
        total += float((logp.exp() * (logp - reference)).sum())
    return total
