"""For each key of the schema another value, the settings in which it matters, and where the change is seen."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.support.adapters import save_adapter
from tests.support.paths import QUICKSTART_MODEL, QUICKSTART_ROWS

LORA = "lora={rank=2}"
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{% if enable_thinking is defined %}!{% endif %}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant{% if enable_thinking is defined %}!{% endif %}: {% endif %}"
)


def nothing(folder: Path) -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Change:
    """Another value of a key, as TOML, and the value before; without one, the key is left out."""

    value: str
    given: tuple[str, ...] = ()
    before: str | None = None
    shows: str = "weights"
    prepare: Callable[[Path], None] = nothing
    without: str = ""  # a line of the config that is left out

    def name_of(self, key: str) -> str:
        return re.sub(r"^loss\(\w+\)", "loss", key).replace("data.", "data.0.", 1)


def with_lora(value: str, *given: str, shows: str = "weights", prepare: Callable[[Path], None] = nothing) -> Change:
    return Change(value, (LORA, *given), shows=shows, prepare=prepare)


def another_model(folder: Path) -> None:
    """Write a model with other weights, by which all tokens are likely."""
    shutil.copytree(QUICKSTART_MODEL, folder / "other")
    weights = load_file(folder / "other" / "model.safetensors")
    save_file(
        {name: 0.3 * tensor for name, tensor in weights.items()},
        folder / "other" / "model.safetensors",
        {"format": "pt"},
    )


def model_with_code(folder: Path) -> None:
    """Write a model that comes with Python code of its own."""
    shutil.copytree(QUICKSTART_MODEL, folder / "coded")
    path = folder / "coded" / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    path.write_text(json.dumps(content | {"model_type": "own", "auto_map": names}), encoding="utf-8")
    (folder / "coded" / "own.py").write_text(OWN_CODE, encoding="utf-8")


def an_adapter(folder: Path) -> None:
    """Write a trained adapter of the quickstart's model."""
    save_adapter(folder / "adapter", QUICKSTART_MODEL)


def a_template(folder: Path) -> None:
    (folder / "t.jinja").write_text(TEMPLATE, encoding="utf-8")


def a_function(folder: Path) -> None:
    (folder / "mine.py").write_text("def told(event):\n    open('told', 'a').write(event.kind)\n", encoding="utf-8")


def _pairs(change: Callable[[int, dict], dict], name: str = "rows.jsonl") -> Callable[[Path], None]:
    """Write changed rows of the quickstart to a file."""

    def prepare(folder: Path) -> None:
        lines = QUICKSTART_ROWS.read_text(encoding="utf-8").splitlines()[:12]
        made = [change(at, json.loads(line)) for at, line in enumerate(lines)]
        (folder / name).write_text("\n".join(map(json.dumps, made)), encoding="utf-8")

    return prepare


def _of(loss: str, **changes: Change) -> dict[str, Change]:
    """Make the rows of a loss, which is given in each."""
    rows = {}
    for key, change in changes.items():
        given = (f"loss.type={loss}", *change.given)
        rows[f"loss({loss}).{key}"] = Change(change.value, given, change.before, change.shows)
    other = "kto" if loss == "dpo" else "dpo"
    rows[f"loss({loss}).type"] = Change(loss, before=other)
    return rows


def _listed(at: int, pair: dict) -> dict:
    answers = [pair["rejected"], pair["chosen"], [{"role": "assistant", "content": f"Nine, {at}."}]]
    return {"prompt": pair["prompt"], "responses": answers, "scores": [0.0, 2.0, 1.5 + at % 2]}


def _broken(at: int, pair: dict) -> dict:
    return pair if at != 3 else {"prompt": 3}


def _equal(at: int, pair: dict) -> dict:
    return pair | ({"rejected": pair["chosen"]} if at == 3 else {})


def _repeated(at: int, pair: dict) -> dict:
    return json.loads(QUICKSTART_ROWS.read_text(encoding="utf-8").splitlines()[0]) if at == 3 else pair


def _turns(at: int, pair: dict) -> dict:
    more = [{"role": "user", "content": "Are you sure?"}, {"role": "assistant", "content": "Yes."}]
    return pair | {"chosen": pair["chosen"] + more, "rejected": pair["rejected"] + more}


def _table(at: int, pair: dict) -> dict:
    return {"a": pair["prompt"][-1]["content"], "b": f"word {at}", "c": f"other {at}", "d": f"third {at}"}


def _text(at: int, pair: dict) -> dict:
    return {"prompt": pair["prompt"][-1]["content"], "chosen": f"word {at}", "rejected": f"other {at}"}


ROWS = "data.0.path=rows.jsonl"

CHANGES: dict[str, Change] = {
    "model.name": Change("other", prepare=another_model),
    "model.revision": Change("v1", shows="refused"),
    "model.dtype": with_lora("bfloat16"),
    "model.quantization": with_lora("nf4"),
    "model.attention": Change("flex", shows="refused"),
    "model.streaming": with_lora("true", shows="words"),
    "model.liger": Change("true", shows="refused"),
    "model.trust_remote_code": Change("true", ("model.name=coded",), "false", "status", model_with_code),
    "lora.rank": with_lora("3"),
    "lora.alpha": with_lora("3.0"),
    "lora.dropout": with_lora("0.5"),
    "lora.target": with_lora("['q_proj']"),
    "lora.exclude": with_lora("['q_proj']"),
    "lora.modules_to_save": with_lora("['lm_head']"),
    "lora.rslora": with_lora("true"),
    "lora.from": Change("adapter", prepare=an_adapter),
    "lora.stack": Change("true", ("lora.from=adapter",), prepare=an_adapter),
    "lora.rank_pattern": with_lora("{q_proj=3}"),
    "lora.alpha_pattern": with_lora("{q_proj=3.0}"),
    "lora.layers": with_lora("[0]"),
    "lora.init": with_lora("gaussian"),
    "lora.plus_ratio": with_lora("16.0"),
    "lora.dora": with_lora("true"),
    **_of(
        "dpo",
        beta=Change("0.5"),
        variants=Change("['hinge']"),
        weights=Change("[3.0]"),
        label_smoothing=Change("0.2"),
        f_divergence=Change("js"),
        f_alpha=Change("0.2", ("loss.f_divergence=alpha",)),
        length_alpha=Change("0.1"),
        weighting=Change("true"),
        discopop_tau=Change("0.5", ("loss.variants=['discopop']",)),
    ),
    **_of("ipo", beta=Change("0.5")),
    **_of(
        "kto",
        beta=Change("0.5"),
        desirable_weight=Change("3.0"),
        undesirable_weight=Change("3.0"),
        kl=Change("none", shows="metrics"),
    ),
    **_of("orpo", beta=Change("0.5"), nll_on=Change("all")),
    **_of(
        "simpo",
        beta=Change("3.0"),
        gamma=Change("0.1"),
        gamma_beta_ratio=Change("0.1"),
        label_smoothing=Change("0.2"),
        sft_weight=Change("1.0"),
        alpha=Change("0.5"),
    ),
    **_of(
        "cpo",
        beta=Change("0.5"),
        variant=Change("hinge"),
        label_smoothing=Change("0.2"),
        sft_weight=Change("0.0"),
        alpha=Change("0.5"),
    ),
    **_of("pl", beta=Change("0.5")),
    **_of("lipo", beta=Change("0.5")),
    **_of("sft"),
    "data.path": Change("rows.jsonl", prepare=_pairs(_turns)),
    "data.split": Change("test", shows="refused"),
    "data.name": Change("other", shows="refused"),
    "data.revision": Change("v1", shows="refused"),
    "data.format": Change(
        "{field_prompt='a', field_chosen='b', field_rejected='d'}",
        (ROWS,),
        prepare=_pairs(_table),
        before="{field_prompt='a', field_chosen='b', field_rejected='c'}",
    ),
    "data.chat": Change("true", (ROWS,), prepare=_pairs(_text)),
    "data.weight": Change("2.5"),
    "data.rows": Change("5"),
    "data.pairs": Change("all", (ROWS,), prepare=_pairs(_listed)),
    "data.min_difference": Change("0.7", (ROWS, "data.0.pairs=all"), prepare=_pairs(_listed)),
    "data.on_error": Change("error", (ROWS,), "drop", "status", _pairs(_broken)),
    "eval.fraction": Change("0.9", ("eval.data=[]",), "0.2", "metrics"),
    "eval.data": Change("[{path='rows.jsonl'}]", shows="metrics", prepare=_pairs(_turns)),
    "eval.every": Change("1", shows="metrics"),
    "eval.samples": Change("0", shows="words"),
    "eval.sample_tokens": Change("9", shows="words"),
    "tokens.max_length": Change("40"),
    "tokens.max_prompt_length": Change("22"),
    "tokens.overlong": Change("drop", ("tokens.max_length=40",)),
    "tokens.score": Change("all", (ROWS,), prepare=_pairs(_turns)),
    "tokens.strict": Change("true", (ROWS,), "false", "status", _pairs(_equal)),
    "tokens.duplicates": Change("drop", (ROWS,), prepare=_pairs(_repeated)),
    "tokens.chat_template": Change("zephyr", ("tokens.max_length=400",)),
    "tokens.chat_template_kwargs": Change(
        "{enable_thinking=false}", ("tokens.chat_template=t.jinja", "tokens.max_length=400"), prepare=a_template
    ),
    "tokens.add": Change("['nine plus']", ("model.name=other",), prepare=another_model),
    "reference.mode": Change("copy", shows="words"),
    "reference.adapter": Change("none", ("lora.from=adapter",), shows="metrics", prepare=an_adapter),
    "reference.name": with_lora("adapter", shows="metrics", prepare=an_adapter),
    "reference.sync": Change("{every=1}", ("reference.mode=copy",)),
    "reference.dtype": Change("bfloat16", ("reference.mode=copy",), shows="metrics"),
    "reference.quantization": Change("nf4", ("reference.mode=copy",), shows="metrics"),
    "train.learning_rate": Change("1e-2"),
    "train.schedule": Change("linear"),
    "train.warmup": Change("2"),
    "train.epochs": Change("2.0", before="1.0", without="steps = 3"),
    "train.steps": Change("2"),
    "train.batch": Change("2"),
    "train.tokens_per_microbatch": Change("60", shows="weights"),
    "train.layout": Change("padded", shows="words"),
    "train.optimizer": Change("adamw_8bit"),
    "train.betas": Change("[0.5, 0.5]"),
    "train.epsilon": Change("1.0"),
    "train.freeze": Change("['embed_tokens']"),
    "train.neftune_alpha": Change("5.0"),
    "train.schedule_options": Change("{num_cycles=3}", ("train.schedule=cosine_with_restarts",)),
    "train.min_lr": Change("9e-4"),
    "train.weight_decay": Change("1.0"),
    "train.max_grad_norm": Change("1e-3"),
    "train.checkpointing": Change("true", shows="words"),
    "train.offload_activations": Change("true", shows="refused"),
    "train.seed": Change("7"),
    "train.nonfinite": Change("stop", ("train.learning_rate=1e30",), "skip", "status"),
    "train.stop": Change("{after=1, metric='eval/loss', by=9.0}"),
    "train.callbacks": Change("['mine:told']", shows="files", prepare=a_function),
    "output.dir": Change("elsewhere", shows="files"),
    "output.save_every": Change("1", shows="files"),
    "output.keep": Change("1", ("output.save_every=1",), shows="files"),
    "output.push_to": Change("me/mine", shows="refused"),
    "log.every": Change("3", shows="metrics"),
    "log.trackers": Change("['tensorboard']", shows="files"),
}
