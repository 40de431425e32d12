"""Every family of causal language models against an independent computation, and the table of them in docs/models.md.

The truth is each sequence alone in a row, under transformers' eager attention: whole logits, autograd.

    python -m tests.model.sweep --write docs/models.md
"""

import argparse
import gc
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastpref.config.losses import ORPO
from fastpref.data.batch import Layout, collate
from fastpref.data.example import Example, Origin
from fastpref.errors import UserError
from fastpref.merge import merge
from fastpref.model.head import OwnLogits
from fastpref.model.load import Loaded, load_model
from fastpref.run.trained import find_trained
from fastpref.step.objective import Objective
from fastpref.step.reference import frozen_copy
from tests.support.families import CANNOT_BE_TINY, FAMILIES, tiny_config
from tests.support.paths import DOCS
from tests.support.tiny import config_for
from tests.support.toy_tokenizers import chatml

CPU = torch.device("cpu")
EXACT = 2e-5  # of log-probabilities in nats, and of gradients relative to the largest gradient


@dataclass
class Family:
    """The findings of a sweep about one family."""

    name: str
    layout: str = ""  # "tree", "padded" or "refused"
    why: str = ""  # the reason for padded rows or for the refusal
    notes: tuple[str, ...] = ()
    own_logits: bool = False
    router_loss: bool = False
    experts: bool = False
    nf4: str = ""
    merge: str = ""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # largest errors: log-probability, gradient
    faults: list[str] = field(default_factory=list)  # every deviation from what is expected


def save_tiny(name: str, folder: Path) -> Path:
    """Write a random float32 model of a family to a folder, and return the folder."""
    torch.manual_seed(0)
    config = tiny_config(name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # move away from the shrunken initial weights, whose logits are nearly equal
        for part, parameter in model.named_parameters():
            if not re.search(r"A_log|dt_bias|time_decay", part) and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if model.config.model_type != config.model_type:  # the model saves only the config of its text part
        config.save_pretrained(folder)
    return folder


def rows(count: int = 5) -> list[Example]:
    """Return pairs of unaligned lengths, with tokens that have no meaning in any config."""
    rng = Random(3)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(20, 150) for _ in range(rng.randint(low, high))]

    return [Example(ids(1, 17), (ids(1, 13), ids(1, 13)), None, Origin(f"row {at}")) for at in range(count)]


_NOT_EAGER = {"falcon+alibi": "sdpa"}  # transformers' eager attention adds Falcon's ALiBi twice


def true_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model of a folder with transformers' own eager attention."""
    options: dict[str, Any] = {"attn_implementation": _NOT_EAGER.get(name, "eager"), "dtype": dtype}
    return AutoModelForCausalLM.from_pretrained(folder, config=tiny_config(name, truth=True), **options).eval()


@dataclass(frozen=True)
class Outcome:
    """The log-probabilities of each sequence, and the gradients of a weighted sum of all of them."""

    logps: list[Tensor]
    gradients: dict[str, Tensor]

    def errors(self, true: "Outcome") -> tuple[float, float]:
        """Return the largest errors of the log-probabilities in nats, and of the gradients relative to the largest."""
        logps = zip(self.logps, true.logps, strict=True)
        none, largest = torch.zeros(()), max(float(g.abs().max()) for g in true.gradients.values())
        errors = {name: self.gradients.get(name, none) - gradient for name, gradient in true.gradients.items()}
        wrong = max(float((logp - truth).abs().max()) for logp, truth in logps)
        return wrong, max(float(error.abs().max()) for error in errors.values()) / largest


def outcome(model: PreTrainedModel, logps: list[Tensor]) -> Outcome:
    model.zero_grad()
    total: Any = sum((logp * torch.linspace(-1, 1, len(logp), dtype=logp.dtype)).sum() for logp in logps)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Outcome([logp.detach() for logp in logps], gradients)


def truth(model: PreTrainedModel, examples: list[Example]) -> Outcome:
    logps: list[Tensor] = []
    for k in range(2):
        for example in examples:
            ids = torch.tensor([example.prompt + example.completions[k]])
            logp = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            logps.append(logp[0, :-1].gather(1, ids[0, 1:, None])[len(example.prompt) - 1 :, 0])
    return outcome(model, logps)


def look(name: str, folder: Path, *, wide: bool = False) -> Family:
    """Check one family and return the findings, deviations in `faults`; `wide` adds what only the page needs."""
    family = Family(name)
    save_tiny(name, folder)
    try:
        loaded = load_model(config_for(folder), CPU)
    except UserError as error:
        family.layout, family.why = "refused", str(error).replace(str(folder), "…")
        return family
    except Exception as error:
        family.faults.append(f"load: {_short(error)}")
        return family
    family.layout, family.why, family.notes = loaded.layout, loaded.why_padded or "", loaded.notes
    family.own_logits = isinstance(loaded.policy.head, OwnLogits)
    family.router_loss = loaded.policy.router is not None
    family.experts = any("experts" in part for part, _ in loaded.model.named_modules())
    examples = rows()
    plain = true_model(name, folder)
    true = truth(plain, examples)
    layouts: list[Layout] = ["tree", "packed"] if loaded.layout == "tree" else ["padded"]
    rounding = cache(partial(_rounding, name, folder, examples, true))
    for layout in layouts:
        _errors(family, loaded, layout, true, rounding)
    if loaded.layout == "tree":
        try:
            padded = load_model(config_for(folder, "train.layout=padded"), CPU)
            _errors(family, padded, "padded", true, rounding)
        except Exception as error:
            family.faults.append(f"train.layout=padded: {_short(error)}")
    for what in (_copies, _generates, _trains, _routes):
        try:
            if (fault := what(loaded, plain, examples)) is not None:
                family.faults.append(fault)
        except Exception as error:
            family.faults.append(f"{what.__name__.strip('_')}: {_short(error)}")
    if wide:
        family.nf4, family.merge = _or_why_not(_four_bits, folder), _or_why_not(_merges, folder, name)
    return family


def _rounding(name: str, folder: Path, examples: list[Example], true: Outcome) -> float:
    """Return twice the difference between transformers' own float32 and float64 results, since some models amplify
    rounding; 0 from a difference of 1e-3 on."""
    error = max(true.errors(truth(true_model(name, folder, torch.float64), examples)))
    return 2 * error if error < 1e-3 else 0.0


def _errors(family: Family, loaded: Loaded, layout: Layout, true: Outcome, rounding: Callable[[], float]) -> None:
    batch = collate(rows(), layout)
    try:
        logp = loaded.policy(batch).logp
        parts = [logp[batch.segments == segment] for segment in range(len(true.logps))]
        family.errors[layout] = outcome(loaded.model, parts).errors(true)
    except Exception as error:
        family.faults.append(f"{layout}: {_short(error)}")
        return
    logp, gradient = family.errors[layout]
    if not max(logp, gradient) <= EXACT and not max(logp, gradient) <= rounding():
        family.faults.append(f"{layout}: log-probabilities off by {logp:.1e}, gradients by {gradient:.1e}")


def _copies(loaded: Loaded, _plain: PreTrainedModel, examples: list[Example]) -> str | None:
    """Return a fault unless a frozen copy gives the same bits."""
    frozen = frozen_copy(loaded.model)
    batch = collate(examples, loaded.layout)
    with torch.no_grad():
        same = torch.equal(loaded.policy.like(frozen)(batch).logp, loaded.policy(batch).logp)
    return None if same else "a copy gives other numbers"


def _generates(loaded: Loaded, plain: PreTrainedModel, examples: list[Example]) -> str | None:
    """Return a fault unless greedy generation with a cache gives the tokens of eager attention."""
    ids = torch.tensor([examples[0].prompt + examples[0].completions[0]])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False,
                               "use_cache": True, "pad_token_id": 0}  # fmt: skip
    try:
        theirs = plain.generate(ids, **options)  # pyright: ignore[reportCallIssue]
    except Exception:
        return None  # transformers itself cannot generate with this model
    ours = loaded.model.generate(ids, **options)  # pyright: ignore[reportCallIssue]
    return None if torch.equal(ours, theirs) else "generates other tokens than under eager attention"


def _trains(loaded: Loaded, _plain: PreTrainedModel, examples: list[Example]) -> str | None:
    """Return a fault unless a step of several micro-batches in training mode gives finite gradients."""
    policy = loaded.policy.train()
    coefficient = policy.router.coefficient if policy.router is not None else 0.0
    objective = Objective(policy, None, ORPO(), loaded.layout, 70, 0, CPU, coefficient)
    loaded.model.zero_grad()
    objective.step(examples, lambda loss: loss.backward())
    policy.eval()
    gradients = [p.grad for p in loaded.model.parameters() if p.grad is not None]
    finite = gradients and all(bool(g.isfinite().all()) for g in gradients)
    return None if finite else "no finite gradients of a step in training mode"


def _routes(loaded: Loaded, plain: PreTrainedModel, examples: list[Example]) -> str | None:
    """Return a fault unless the router loss of padded rows is the model's own."""
    if loaded.policy.router is None:
        return None
    batch = collate(examples, "padded")
    loaded.policy.train()
    ours = loaded.policy(batch).router_loss
    loaded.policy.eval()
    model: Any = plain.train()
    options = {"attention_mask": batch.attention_mask, "output_router_logits": True, "use_cache": False}
    try:
        theirs = model(input_ids=batch.input_ids, **options).aux_loss
    except Exception:
        return None  # transformers' own code for this loss fails
    ours, theirs = (0.0 if loss is None else float(torch.as_tensor(loss).detach()) for loss in (ours, theirs))
    return None if abs(ours - theirs) <= 1e-4 * max(1.0, abs(theirs)) else f"router loss {ours:.6f}, not {theirs:.6f}"


def _or_why_not(check: Callable[..., str], folder: Path, *args: Any) -> str:
    """Return the result of a check on a folder, or how it fails."""
    try:
        return check(folder, *args)
    except UserError as error:
        return f"refused: {str(error).replace(str(folder), '…')}"
    except Exception as error:
        return f"crash: {_short(error)}"


def _four_bits(folder: Path) -> str:
    """Return the layout in which the model trains with 4-bit linear layers."""
    loaded = load_model(config_for(folder, 'model.quantization="nf4"', "lora={}"), CPU)
    loaded.policy.train()(collate(rows(2), loaded.layout)).logp.sum().backward()
    return loaded.layout


def _merges(folder: Path, name: str) -> str:
    """Return "yes" if an adapter on all linear layers can be merged, else its lost share."""
    chatml().save_pretrained(folder)
    options: dict[str, Any] = {"input_ids": torch.tensor([[*rows(1)[0].prompt, 30, 40, 50]]), "use_cache": False}
    loaded = load_model(config_for(folder, "lora={}"), CPU)
    with torch.no_grad():
        before = loaded.model(**options).logits.float()
        for part, parameter in loaded.wrapped.named_parameters():
            if "lora_" in part:
                parameter.copy_(0.2 * torch.randn_like(parameter))
        expected = loaded.model(**options).logits.float()
    loaded.wrapped.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    merged = merge(find_trained(str(folder / "adapter"), ["lora={}"]), folder / "merged", verify=False)
    again: Any = AutoModelForCausalLM.from_pretrained(
        merged.folder, config=tiny_config(name, truth=True), dtype=torch.float32, output_loading_info=True
    )
    model, report = again
    if report["missing_keys"] or report["mismatched_keys"]:
        return f"lacks {sorted(report['missing_keys'])[:1]}"
    lost = float((model.eval()(**options).logits.float() - expected).norm() / (expected - before).norm())
    return "yes" if lost < 1e-3 else f"{lost:.0%} is lost"


def _short(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{place}"


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = DOCS / "models.md"
_BEGIN, _END = "<!-- the sweep begins here -->", "<!-- the sweep ends here -->"


def page_rows(text: str) -> dict[str, str]:
    """Return the layout of each family on the page."""
    table = text[text.index(_BEGIN) : text.index(_END)]
    return dict(re.findall(r"^\| `([^`]+)` \| (\w+) ", table, re.MULTILINE))


def page_version(text: str) -> str:
    """Return the version of transformers that the page is about."""
    (version,) = re.findall(r"transformers ([\w.]+)", text[text.index(_BEGIN) : text.index(_END)])[:1]
    return version


def written(text: str, rows: dict[str, str]) -> str:
    """Return the page with these rows in its table, replacing its rows of the same families."""
    begin, end = text.index(_BEGIN), text.index(_END)
    rows = dict(re.findall(r"^(?=\| `([^`]+)`)(.*)$", text[begin:end], re.MULTILINE)) | rows
    rows = {name: rows[name] for name in FAMILIES if name in rows}
    layouts = Counter(row.split(" | ")[1] for row in rows.values())
    lines = [
        _BEGIN,
        f"The sweep tried {len(rows)} families and variants of transformers {transformers.__version__} (with torch "
        f"{torch.__version__.partition('+')[0]}): {layouts['tree']} take trees, {layouts['padded']} are trained on "
        f"padded rows, {layouts['refused']} are refused. `family+variant` is a family with another config.",
        "",
        "| model type | layout | logits | router loss | experts | nf4 | merge | reason, remarks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows.values(),
        "",
        "Not tried, because they cannot be made tiny:",
        "",
        *(f"- `{name}`: {why}." for name, why in sorted(CANNOT_BE_TINY.items())),
        "",
        "",
    ]
    return text[:begin] + "\n".join(lines) + text[end:]


def _row(family: Family) -> str:
    if family.layout == "refused":
        cells = ["–"] * 5
    else:
        nf4 = "yes" if family.nf4 == family.layout else family.nf4
        cells = ["own code" if family.own_logits else "fused", "yes" if family.router_loss else "–",
                 "yes" if family.experts else "–", _plain(nf4), _plain(family.merge)]  # fmt: skip
    remarks = [family.why, *(note for note in family.notes if not note.startswith("logits:")), *family.faults]
    return f"| `{family.name}` | {family.layout} | {' | '.join(cells)} | {_plain('; '.join(filter(None, remarks)))} |"


def _plain(text: str) -> str:
    """Return the text without what differs between machines, and without what a table cannot hold."""
    text = re.sub(r"differ by [\d.e+-]+ of their size", "differ", text)
    text = re.sub(r"\(log-probabilities differ[^)]*\)", "", text)
    text = re.sub(r"model\.name = '…': ", "", text)
    return " ".join(text.replace("|", "\\|").replace("<", "‹").replace(">", "›").split())[:260]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; all of them if none is named")
    parser.add_argument("--write", type=Path, help="the page whose table is given the rows of these families")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    families = []
    for name in options.names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                family = look(name, Path(folder), wide=True)
            except Exception as error:
                family = Family(name, faults=[f"cannot be tried: {_short(error)}"])
        families.append(family)
        gc.collect()
        print(_row(family), {k: f"{a:.0e}/{b:.0e}" for k, (a, b) in family.errors.items()}, flush=True)
        if options.write is not None:
            options.write.write_text(written(options.write.read_text(), {name: _row(family)}))
    if any(family.faults for family in families):
        sys.exit("not all is as it should be: " + ", ".join(family.name for family in families if family.faults))


if __name__ == "__main__":
    main()
