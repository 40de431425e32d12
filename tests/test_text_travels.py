"""The settings of text in training are saved with the result: end of an answer, template, keywords, day.

The model here writes a fixed chain of tokens after any question: "ab", the token with which rows end, then
"cdcdcd…". The answer "ab" ends as in training; an answer that only the model's own settings can end never does.
"""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.utils import chat_template_utils

import fastpref
from fastpref.atomic import _manifest as manifest_text
from fastpref.commands import chat as chats
from fastpref.commands.chat import chat
from fastpref.commands.evaluate import evaluate
from fastpref.data import cache
from fastpref.data.template.named import KNOWN
from fastpref.data.template.text import TEXT, TextRecord, read_text
from fastpref.errors import UserError
from fastpref.merge import merge
from fastpref.run.trained import find_trained
from fastpref.training import start
from tests.support.toy_tokenizers import CHATML, LLAMA3, toy_tokenizer

ASKED = [{"role": "user", "content": "Why?"}]
CHAT = {"prompt": ASKED, "chosen": "so", "rejected": "no"}
INTEL = {"question": "Why?", "chosen": "so", "rejected": "no"}
PLAIN = {"prompt": "Why?\n", "chosen": "so", "rejected": "no"}
ASKS = {"messages": ASKED, "chosen": "so", "rejected": "no"}
OWN = f'{{ type = "chat_template.default", chat_template = {json.dumps(CHATML)} }}'
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@dataclass(frozen=True)
class Case:
    """A tokenizer, a row, and the token with which training ends rows; the model's own end is `eos`, or `own`."""

    end: str
    row: dict[str, Any]
    eos: str = "<|endoftext|>"
    own: str | None = None
    template: str | None = None  # the tokenizer's own
    named: str | None = None  # tokens.chat_template
    form: str = '"auto"'  # as TOML
    special: Sequence[str] = CHATML_TOKENS

    @property
    def jinja(self) -> str | None:
        """Return the template that writes the rows."""
        if self.form == OWN:
            return CHATML
        return KNOWN.get(self.named or "", self.named or self.template)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        bos = "<|begin_of_text|>" if self.special == LLAMA3_TOKENS else None
        return toy_tokenizer(self.template, eos=self.eos, bos=bos, special=self.special)


CASES = {
    "base and chatml by name": Case("<|im_end|>", CHAT, named="chatml"),
    "base and jinja": Case("<|im_end|>", CHAT, named=CHATML),
    "the tokenizer's own chatml": Case("<|im_end|>", CHAT, template=CHATML),
    "chatml of the source, no other": Case("<|im_end|>", ASKS, form=OWN),
    "chatml of the source, before another": Case("<|im_end|>", ASKS, form=OWN, template=LLAMA3),
    "llama3": Case("<|eot_id|>", CHAT, eos="<|end_of_text|>", template=LLAMA3, special=LLAMA3_TOKENS),
    "chatml.intel": Case("<|im_end|>", INTEL, form='"chatml.intel"'),
    "plain text": Case("</s>", PLAIN, eos="</s>", own="z"),
}
TRAINED = {"lora": ["lora={rank=2}"], "full": []}


def chain_model(tokenizer: PreTrainedTokenizerBase, end: str, own: str, folder: Path) -> Path:
    """Save a model that writes a, b, the end, c, d, c, d, … after a line end, and stops only at `own`."""
    size = len(tokenizer)
    hidden = -(-size // 8) * 8
    config = LlamaConfig(
        vocab_size=size, hidden_size=hidden, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=256, eos_token_id=tokenizer.convert_tokens_to_ids(own), bos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).float()
    chain = ["Ċ", "a", "b", end, "c", "d", "c"]
    with torch.no_grad():
        for parameter in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            parameter.weight.zero_()  # so that a token's state depends on that token alone
        model.model.embed_tokens.weight.copy_(torch.eye(size, hidden))
        model.lm_head.weight.zero_()
        ids: Any = tokenizer.convert_tokens_to_ids(chain)
        model.lm_head.weight[ids[1:], ids[:-1]] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


def run_of(case: Case, folder: Path, *overrides: str) -> Path:
    """Train two steps that do not change the model, and return the run's folder."""
    model = chain_model(case.tokenizer(), case.end, case.own or case.eos, folder / "model")
    rows = [case.row | {"chosen": word} for word in ("so", "yes", "well")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f'path = "{(folder / "rows.jsonl").as_posix()}"\nformat = {case.form}\n'
    (folder / "cfg.toml").write_text(
        f'[model]\nname = "{model.as_posix()}"\n[[data]]\n{source}[[eval.data]]\n{source}[eval]\nsample_tokens = 8\n'
        "[train]\nlearning_rate = 1e-12\nsteps = 2\nbatch = 2\n"
        f'[output]\ndir = "{(folder / "run").as_posix()}"\nsave_every = 1\n'
    )
    named = [f"tokens.chat_template={json.dumps(case.named)}"] if case.named else []
    return fastpref.train(folder / "cfg.toml", [*named, *overrides]).output_dir


def written(model: Any, tokenizer: Any, **options: Any) -> str:
    """Return the most likely tokens after a line end, at most eight, with special tokens."""
    ids = torch.tensor([[tokenizer.convert_tokens_to_ids("Ċ")]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **options
    )
    return tokenizer.decode(out[0, 1:])


def results_of(run: Path, trained: str, folder: Path) -> list[Path]:
    """Return the run's result elsewhere, and that of its adapters merged."""
    alone = shutil.copytree(run / "final", folder / "alone")
    if trained == "full":
        return [alone]
    return [alone, merge(find_trained(str(alone)), folder / "merged", verify=False).folder]


def recorded(folder: Path) -> TextRecord:
    record = read_text(folder)
    assert record is not None
    return record


def answer(place: Path, *overrides: str, compare: bool = False) -> list[str]:
    """Return the lines that `fastpref chat` prints."""
    out = io.StringIO()
    trained = find_trained(str(place), overrides)
    chat(trained, compare=compare, temperature=0, max_tokens=8, given=io.StringIO("Why?\n"), out=out)
    return out.getvalue().split("\n")[:-1]


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", CASES)
def test_an_answer_ends_where_training_ended_it(name: str, trained: str, tmp_path: Path):
    """An answer ends as in training: in samples of the run, in `chat` with the run, its checkpoint and its result
    elsewhere, with transformers and PEFT, and after merging. The model's own end still ends an answer too, and the
    template is saved."""
    case = CASES[name]
    run = run_of(case, tmp_path, *TRAINED[trained])
    tokenizer: Any = case.tokenizer()
    end, own = tokenizer.convert_tokens_to_ids([case.end, case.own or case.eos])
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert written(base, tokenizer) == f"ab{case.end}cdcdc"  # what the model alone writes

    samples = json.loads((run / "run.json").read_text())["samples"]
    assert [(sample["before"], sample["after"]) for sample in samples] == [("ab", "ab")]

    places = [run, run / "checkpoints" / "step-2", *results_of(run, trained, tmp_path)]
    template = [] if case.jinja else ["tokens.chat_template=chatml"]
    for place in places:
        assert answer(place, *template) == ["ab"], place
    assert answer(run, *template, compare=True) == ["before: ab", "trained: ab"]

    for place in (*places[1:], run / "final"):
        generation: Any = GenerationConfig.from_pretrained(place)
        assert generation.eos_token_id == [end, own]
        assert not generation._from_model_config  # so that nothing is read from config.json instead
        record = recorded(place)
        assert record.ends == {case.end: end}
        saved: Any = AutoTokenizer.from_pretrained(place)
        assert saved.chat_template == record.chat_template == case.jinja
        if (place / "adapter_config.json").exists():
            model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), place)
            assert written(model, tokenizer, generation_config=generation) == f"ab{case.end}"
        else:
            assert written(AutoModelForCausalLM.from_pretrained(place), tokenizer) == f"ab{case.end}"
    assert (run / TEXT).read_text() == (run / "final" / TEXT).read_text()


# --- The keywords and the day ----------------------------------------------------------------------------------------

DATED = (  # as Llama 3.2, gpt-oss and Qwen 3
    "{{ strftime_now('%d %b %Y') + (' thinks' if enable_thinking | default(true) else '') + '\n' }}" + CHATML
)
FIRST, LATER = date(2026, 11, 26), date(2031, 2, 3)
MODULES = (start, cache)  # these get the day of a run, or of tokens without a run


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> Callable[[date], None]:
    """Return a function that sets the day, for this program and for transformers."""

    def be(day: date) -> None:
        class Day(date):
            @classmethod
            def today(cls) -> date:
                return day

        class Now(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.combine(day, time(9))

        for module in MODULES:
            monkeypatch.setattr(module, "date", Day)
        monkeypatch.setattr(chat_template_utils, "datetime", Now)

    return be


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the texts that `chat` gives the model."""
    texts = []

    def apply(*args: Any, **how: Any) -> str:
        texts.append(write(*args, **how))
        return texts[-1]

    write = chats.apply
    monkeypatch.setattr(chats, "apply", apply)
    return texts


@pytest.mark.parametrize("trained", TRAINED)
def test_a_run_keeps_its_day_and_its_keywords(
    trained: str, tmp_path: Path, today: Callable[[date], None], asked: list[str], monkeypatch: pytest.MonkeyPatch
):
    """A run resumed on a later day has the same metrics; `eval` and `chat` of it use the first day and its keywords,
    also for its results elsewhere; another run uses the later day."""
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "cache"))
    case, keywords = Case("<|im_end|>", CHAT, template=DATED), "tokens.chat_template_kwargs={ enable_thinking = false }"
    today(FIRST)
    run = run_of(case, tmp_path, keywords, *TRAINED[trained])
    whole = (run / "metrics.jsonl").read_text().splitlines()
    then = evaluate(find_trained(str(run)))
    config = tmp_path / "run" / "config.toml"
    today(LATER)
    fastpref.train(config, resume=run / "checkpoints" / "step-1", force=True)
    loss = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert loss == [json.loads(line).get("loss") for line in whole]
    assert evaluate(find_trained(str(run))) == then
    record = recorded(run)
    assert (record.day, record.chat_template_kwargs) == (FIRST, {"enable_thinking": False})

    places = [run, *results_of(run, trained, tmp_path)]
    for place in places:
        answer(place)
        answer(place, "tokens.chat_template_kwargs.enable_thinking=true")
    assert [text.partition("\n")[0] for text in asked] == ["26 Nov 2026", "26 Nov 2026 thinks"] * len(places)

    other = fastpref.train(config, [f'output.dir="{(tmp_path / "other").as_posix()}"']).output_dir
    assert recorded(other).day == LATER


def test_a_run_is_resumed_as_its_rows_were_written(tmp_path: Path):
    """A resume with another template or other keywords is refused, and the message names them."""
    case = Case("<|im_end|>", CHAT, template=DATED)
    run = run_of(case, tmp_path, "tokens.chat_template_kwargs={ enable_thinking = false }")
    checkpoint = run / "checkpoints" / "step-1"

    def resume(*overrides: str) -> None:
        fastpref.train(run / "config.toml", overrides, resume=checkpoint, force=True)

    with pytest.raises(UserError, match="enable_thinking: False → True"):
        resume("tokens.chat_template_kwargs.enable_thinking=true")
    (tmp_path / "other.jinja").write_text(DATED + "{# another #}")
    with pytest.raises(
        UserError, match=r"the chat template .* not .* trained with:\n  tokens.chat_template: not set →"
    ):
        resume(f'tokens.chat_template="{(tmp_path / "other.jinja").as_posix()}"')


def test_a_record_that_is_damaged_is_an_error(tmp_path: Path):
    """A damaged record gives an error with the file's name, whichever part is damaged."""
    chain_model(Case("<|im_end|>", CHAT).tokenizer(), "<|im_end|>", "<|endoftext|>", tmp_path)
    whole = {"chat_template": None, "chat_template_kwargs": {}, "day": "2026-11-26", "ends": {"<|im_end|>": 258}}
    (tmp_path / TEXT).write_text(json.dumps(whole))
    assert find_trained(str(tmp_path)).text is not None
    harmed = [whole | {"day": "soon"}, whole | {"ends": [258]}, {"day": "2026-11-26"}, [], whole | {"ends": {"a": "b"}}]
    for text in (*map(json.dumps, harmed), json.dumps(whole)[:40]):
        (tmp_path / TEXT).write_text(text)
        with pytest.raises(UserError, match=r"text\.json: cannot be read"):
            find_trained(str(tmp_path))


def test_an_older_run_has_no_record(tmp_path: Path):
    """A run without a record, from an older version, can be evaluated and resumed."""
    run = run_of(Case("<|im_end|>", CHAT, template=CHATML), tmp_path)
    for path in run.rglob(TEXT):
        path.unlink()
    manifest = run / "checkpoints" / "step-1" / "manifest.json"
    listed = json.loads(manifest.read_text())["files"]
    del listed[TEXT]
    manifest.write_text(manifest_text(listed))
    assert find_trained(str(run)).text is None
    assert evaluate(find_trained(str(run)))["examples"] == 3
    result = fastpref.train(run / "config.toml", resume=run / "checkpoints" / "step-1", force=True)
    assert read_text(result.output_dir) is not None


def test_a_template_that_was_changed_later_is_not_the_runs(tmp_path: Path, asked: list[str]):
    """If the file of a template changes after training, the result keeps the template of its rows, and only an
    override selects another."""
    jinja = tmp_path / "chat.jinja"
    jinja.write_text("first\n" + CHATML)
    run = run_of(Case("<|im_end|>", CHAT), tmp_path, f'tokens.chat_template="{jinja.as_posix()}"')
    for change in (lambda: jinja.write_text("second\n" + CHATML), jinja.unlink):
        change()
        answer(run)
    answer(run, "tokens.chat_template=chatml")
    assert [text.partition("\n")[0] for text in asked] == ["first", "first", "<|im_start|>user"]


def test_a_result_on_the_hub_brings_its_text(tmp_path: Path, asked: list[str]):
    """A result on the hub has its text settings too; they are found in the hub's cache by the model's name."""
    run = run_of(Case("<|im_end|>", CHAT, template=DATED), tmp_path)
    cached = Path(constants.HF_HUB_CACHE) / "models--me--texts"
    revision = "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    shutil.copytree(run / "final", cached / "snapshots" / revision)
    text = json.loads((run / TEXT).read_text()) | {"day": FIRST.isoformat()}
    (cached / "snapshots" / revision / TEXT).write_text(json.dumps(text))
    assert answer(Path("me/texts")) == ["ab"]
    assert asked[0].startswith("26 Nov 2026 thinks\n")
