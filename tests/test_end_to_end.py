"""Ten configs with ten real formats of preference data, from `init` to `merge` to loading the result with transformers.

The law: `fastpref eval` gives the numbers that transformers computes. They are computed here without fastpref: the
chat template of the merged folder's tokenizer writes the conversation from which a row was made (not the row), and
that folder's model scores the assistant's tokens. So every case covers every step between the file and the reloaded
model, and a mistake in any of them makes two numbers differ.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fastpref.data.template.named import KNOWN
from fastpref.data.template.text import read_text
from fastpref.model.quantize import keep_weights_as_loaded
from tests.support.command_line import run_command, succeed
from tests.support.runs import last_evaluation
from tests.support.tiny import MAMBA, VISION
from tests.support.toy_tokenizers import QWEN3, toy_tokenizer, trained_chatml, trained_gemma

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
    pytest.mark.usefixtures("elsewhere"),
]
Row = dict[str, Any]
Message = dict[str, Any]

# --- Conversations ---------------------------------------------------------------------------------------------------

_CAPITALS = (
    "Norway Oslo Bergen, Peru Lima Cusco, Japan Tokyo Osaka, Kenya Nairobi Mombasa, Chile Santiago Arica, "
    "Cuba Havana Trinidad, Mali Bamako Gao, Oman Muscat Sohar, Laos Vientiane Pakse, Nepal Kathmandu Pokhara, "
    "Fiji Suva Nadi, Ghana Accra Tamale, Iraq Baghdad Mosul, Spain Madrid Cadiz, Italy Rome Turin, Egypt Cairo Luxor"
)
WORDS = [part.split() for part in _CAPITALS.split(", ")]
_OF_LAND = {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]}
TOOL = {"type": "function", "function": {"name": "capital", "description": "Looks up", "parameters": _OF_LAND}}


@dataclass(frozen=True)
class Talk:
    """A prompt with two answers, as messages in the form that transformers' chat templates take."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None = None


def _turn(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def _question(land: str) -> list[Message]:
    return [_turn("user", f"Name the capital of {land}.")]


def _short(land: str, right: str, wrong: str) -> Talk:
    answers = [[_turn("assistant", f"It is {word}.")] for word in (right, f"surely {wrong}")]
    return Talk(_question(land), *answers)


def _long(land: str, right: str, wrong: str) -> Talk:
    before = [_turn("system", "Be brief."), _turn("user", "Hello"), _turn("assistant", f"Ask of {land}!")]
    prompt = [*before, _turn("user", f"Answer at once.\nWhat is the capital of {land}?")]
    return replace(_short(land, right, wrong), prompt=prompt)


def _turns(land: str, right: str, wrong: str) -> Talk:
    """Return answers that contain a question of the user."""
    answers = [
        [_turn("assistant", f"It is {word}."), _turn("user", "Sure?"), _turn("assistant", f"Yes, {word} it is.")]
        for word in (right, wrong)
    ]
    return Talk(_question(land), *answers)


def _one_turn(land: str, right: str, wrong: str) -> Talk:
    talk = _turns(land, right, wrong)
    return replace(talk, chosen=talk.chosen[:1], rejected=talk.rejected[:1])


def _tools(land: str, right: str, wrong: str) -> Talk:
    """Return answers that reason, call a tool and read its result."""
    answers = []
    for of, result in ((land, right), (wrong, wrong)):
        call = {"type": "function", "function": {"name": "capital", "arguments": {"of": of}}}
        thinks = _turn("assistant", "", tool_calls=[call], reasoning_content=f"I look {of} up.")
        answers.append([thinks, _turn("tool", f"{result}!"), _turn("assistant", f"It is {result}.")])
    return Talk(_question(land), *answers, tools=[TOOL])


# --- Shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The form of a talk in a file. Without a form for single completions, KTO splits the pairs."""

    talk: Callable[[str, str, str], Talk]
    suffix: str
    pair: Callable[[Talk], Row]
    single: Callable[[Talk, list[Message], bool], Row] | None = None

    def write(self, talks: Sequence[Talk], path: Path, *, single: bool) -> None:
        rows = [self.pair(talk) for talk in talks]
        if single and self.single:
            sides = [(talk, side) for talk in talks for side in (talk.chosen, talk.rejected)]
            rows = [self.single(talk, side, side is talk.chosen) for talk, side in sides]
        if self.suffix == "parquet":
            Dataset.from_list(rows).to_parquet(path)
        elif self.suffix == "csv":
            Dataset.from_list(rows).to_csv(path)
        elif self.suffix == "json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _last(messages: list[Message]) -> str:
    return messages[-1]["content"]


def _ultrafeedback(talk: Talk) -> Row:
    chosen, rejected = talk.prompt + talk.chosen, talk.prompt + talk.rejected
    return {"prompt": _last(talk.prompt), "prompt_id": "7f", "chosen": chosen, "rejected": rejected,
            "messages": chosen, "score_chosen": 8.0, "score_rejected": 5.5}  # fmt: skip


def _alpaca(talk: Talk) -> Row:
    system, *history, question = talk.prompt
    instruction, text = question["content"].split("\n")
    pairs = [[ask["content"], answer["content"]] for ask, answer in zip(history[::2], history[1::2])]
    return {"instruction": instruction, "input": text, "system": system["content"], "history": pairs}


def _sharegpt(messages: list[Message]) -> list[Row]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


def _transcript(messages: list[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)


def _calls_as_text(messages: list[Message]) -> list[Message]:
    """Return the calls as in OpenAI's API: arguments are JSON text, a call has an id, and its content is null."""
    turns = json.loads(json.dumps(messages))
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            call["id"], turn["content"] = "call_0", None
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if turn["role"] == "tool":
            turn["tool_call_id"] = "call_0"
    return turns


def _parts(messages: list[Message]) -> list[Message]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


SHAPES = {
    "TRL, prompt of messages": Shape(
        _long, "jsonl",
        lambda t: {"prompt": t.prompt, "chosen": t.chosen, "rejected": t.rejected},
        lambda t, side, good: {"prompt": t.prompt, "completion": side, "label": good},
    ),
    "TRL, conversations": Shape(
        _long, "parquet", lambda t: {"chosen": t.prompt + t.chosen, "rejected": t.prompt + t.rejected}
    ),
    "UltraFeedback": Shape(_short, "parquet", _ultrafeedback),
    "LLaMA-Factory, alpaca": Shape(
        _long, "json",
        lambda t: _alpaca(t) | {"chosen": _last(t.chosen), "rejected": _last(t.rejected)},
        lambda t, side, good: _alpaca(t) | {"output": _last(side), "kto_tag": good},
    ),
    "LLaMA-Factory, ShareGPT": Shape(
        _short, "json",
        lambda t: {"conversations": _sharegpt(t.prompt), "chosen": _sharegpt(t.chosen)[0],
                   "rejected": _sharegpt(t.rejected)[0]},
        lambda t, side, good: {"conversations": _sharegpt(t.prompt + side), "kto_tag": good},
    ),
    "hh-rlhf": Shape(
        _one_turn, "jsonl",
        lambda t: {"chosen": _transcript(t.prompt + t.chosen), "rejected": _transcript(t.prompt + t.rejected)},
    ),
    "ms-swift": Shape(
        _long, "jsonl",
        lambda t: {"messages": t.prompt + t.chosen, "rejected_response": _last(t.rejected)},
        lambda t, side, good: {"messages": t.prompt + side, "label": good},
    ),
    "OpenAI tools": Shape(
        _tools, "jsonl",
        lambda t: {"messages": t.prompt, "chosen": _calls_as_text(t.chosen), "rejected": _calls_as_text(t.rejected),
                   "tools": t.tools},
        lambda t, side, good: {"messages": t.prompt, "completion": _calls_as_text(side), "label": good,
                               "tools": t.tools},
    ),
    "CSV with cells of JSON": Shape(
        _long, "csv",
        lambda t: {"prompt": json.dumps(t.prompt), "chosen": json.dumps(t.chosen), "rejected": json.dumps(t.rejected)},
        lambda t, side, good: {"prompt": json.dumps(t.prompt), "completion": json.dumps(side), "label": good},
    ),
    "parts, answers of several turns": Shape(
        _turns, "parquet",
        lambda t: {"prompt": _parts(t.prompt), "chosen": _parts(t.chosen), "rejected": _parts(t.rejected)},
        lambda t, side, good: {"prompt": _parts(t.prompt), "completion": _parts(side), "label": good},
    ),
}  # fmt: skip


# --- Configs ---------------------------------------------------------------------------------------------------------

SIZES: Row = {
    "vocab_size": 448, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GEMMA3_TEMPLATE = (  # as Gemma 3's: the system prompt begins the first question, and content is text or parts
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set begin = (messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'])"
    " + '\n\n' %}{% set turns = messages[1:] %}{% else %}{% set begin = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (begin if loop.first else '')"
    " }}{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
EFFORT_TEMPLATE = "{% if effort %}{{ '<|im_start|>system\nEffort: ' + effort + '<|im_end|>\n' }}{% endif %}" + QWEN3
TEXT: Row = {
    "model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
GEMMA3: Row = {
    "text_config": SIZES | TEXT | {"vocab_size": 512}, "vision_config": VISION, "mm_tokens_per_image": 4,
    "image_token_index": 511, "boi_token_index": 510, "eoi_token_index": 509,
}  # fmt: skip


def _base() -> Any:
    """Make the tokenizer of a base model, without a template; its end of text ends no turn."""
    return toy_tokenizer(eos="<|endoftext|>", special=["<|im_start|>", "<|im_end|>"])


@dataclass(frozen=True)
class Setting:
    """A loss, a model and the part of it that is trained."""

    loss: str
    model_type: str
    sizes: Row
    overrides: Sequence[str] = ()
    adapters: bool = True
    tokenizer: Callable[[], Any] = trained_chatml
    template: str = QWEN3  # writes the rows
    keywords: Row = field(default_factory=dict)  # of the template
    layout: str = "tree"
    tools: bool = True  # whether the template writes tools
    nf4: bool = False


GPT2: Row = {"vocab_size": 448, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": None,
             "eos_token_id": None}  # fmt: skip
CONFIGS = {
    "dpo, LoRA": Setting("dpo", "llama", SIZES),
    "dpo, whole, copy, packed": Setting(
        "dpo", "qwen3", SIZES, ("reference.mode=copy", "train.layout=packed"), adapters=False, layout="packed"
    ),
    "kto, tied head, precompute": Setting(
        "kto", "qwen2", SIZES | {"tie_word_embeddings": True},
        ('lora.target=["q_proj","down_proj","lm_head"]', "reference.mode=precompute"),
    ),
    "ipo, DoRA": Setting("ipo", "mistral", SIZES | {"sliding_window": 9}, ("lora.dora=true",)),
    "orpo, whole, base model": Setting(
        "orpo", "llama", SIZES, ("tokens.chat_template=chatml",), adapters=False, tokenizer=_base,
        template=KNOWN["chatml"], tools=False,
    ),
    "simpo, experts": Setting(
        "simpo", "qwen3_moe", SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    ),
    "cpo, rsLoRA, Gemma 3 with vision": Setting(
        "cpo", "gemma3", GEMMA3, ("lora.rslora=true",), tokenizer=trained_gemma, template=GEMMA3_TEMPLATE, tools=False
    ),
    "dpo, nf4": Setting("dpo", "llama", SIZES, ("model.quantization=nf4",), nf4=True),
    "dpo, Falcon-H1, keywords": Setting(
        "dpo", "falcon_h1", SIZES | MAMBA, ('tokens.chat_template_kwargs={effort="low"}',),
        template=EFFORT_TEMPLATE, keywords={"effort": "low"}, layout="padded",
    ),
    "kto, whole, gpt2, padded": Setting(
        "kto", "gpt2", GPT2, ("train.layout=padded",), adapters=False, layout="padded"
    ),
}  # fmt: skip
COMMON = (
    "eval.fraction=0.4", "eval.sample_tokens=2", "tokens.max_length=400", "train.steps=2", "train.batch=4",
    "train.learning_rate=2e-2",
)  # fmt: skip
CASES = [
    pytest.param(config, shape, id=f"{config}: {shape}", marks=[] if i == j else [pytest.mark.slow])
    for i, config in enumerate(CONFIGS)
    for j, shape in enumerate(SHAPES)
]


def save_untrained(setting: Setting, folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = setting.tokenizer()
    if tokenizer.chat_template:
        tokenizer.chat_template = setting.template
    ends = {} if setting.model_type == "gemma3" else {"eos_token_id": tokenizer.eos_token_id}
    config = CONFIG_MAPPING[setting.model_type](**setting.sizes | ends)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return folder


# --- With transformers alone -----------------------------------------------------------------------------------------


def scored(tokenizer: Any, prompt: list[Message], side: list[Message], talk: Talk, keywords: Row) -> tuple[Any, Any]:
    """Return a conversation's token ids, [1, T], and a mask of those that the assistant wrote in its answer, [T]."""

    def text(messages: list[Message], **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, tools=talk.tools, tokenize=False, **keywords, **options)

    whole = text(prompt + side).rstrip("\n")
    spans = []
    for at, turn in enumerate(side):
        if turn["role"] == "assistant":
            before, after = text(prompt + side[:at], add_generation_prompt=True), text(prompt + side[: at + 1])
            assert after.startswith(before)
            assert whole.startswith(after.rstrip("\n"))
            spans.append((len(before), len(after.rstrip("\n"))))
    coded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    written = [any(low <= start < high for low, high in spans) for start, _ in coded["offset_mapping"]]
    return torch.tensor([coded["input_ids"]]), torch.tensor(written)


@torch.no_grad()
def mean_logps(model: Any, tokenizer: Any, talks: Sequence[Talk], side: str, keywords: Row) -> float:
    """Return the mean over talks of an answer's log-probability."""
    total = 0.0
    for talk in talks:
        ids, written = scored(tokenizer, talk.prompt, getattr(talk, side), talk, keywords)
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        total += float(logps.gather(1, ids[0, 1:, None])[:, 0][written[1:]].sum())
    return total / len(talks)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(3, 43)[None], use_cache=False).logits.float()


def with_adapter(model: Path, adapter: Path, setting: Setting) -> torch.Tensor:
    """Return the logits of PEFT's own model."""
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options: Row = {"quantization_config": four_bits} if setting.nf4 else {}
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    keep_weights_as_loaded(base)
    return logits(PeftModel.from_pretrained(base, str(adapter)))


# --- The law ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a config's name to the folder of its untrained model, which is made only once."""
    return cache(lambda name: save_untrained(CONFIGS[name], tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_from_a_file_to_a_model_that_transformers_loads(
    config: str, shape: str, models: Callable[[str], Path], tmp_path: Path
):
    """The trained model's numbers are those that transformers alone computes from the conversations."""
    setting, form, model = CONFIGS[config], SHAPES[shape], models(config)
    talks, single = [form.talk(*words) for words in WORDS], setting.loss == "kto"
    data, heldout = tmp_path / f"rows.{form.suffix}", tmp_path / f"heldout.{form.suffix}"
    form.write(talks, data, single=single)
    form.write(talks[:5], heldout, single=single)
    succeed("init", "--loss", setting.loss, "--model", model, "--data", data.name, "--output", "cfg.toml")
    if not setting.adapters:
        text = Path("cfg.toml").read_text(encoding="utf-8")
        Path("cfg.toml").write_text(without_lora(text), encoding="utf-8")
    overrides = [*COMMON, *setting.overrides]
    assert "no mistakes" in succeed("check", "cfg.toml", *overrides).out
    if talks[0].tools and not setting.tools:
        refused(overrides)
        return

    shown = succeed("preview", "cfg.toml", *overrides).out
    assert all(word in shown for word in (("good", "bad") if single else ("chosen", "rejected")))
    trained = succeed("train", "cfg.toml", *overrides, "output.dir=run").out
    assert f"layout {setting.layout}" in trained
    assert "NOT" not in trained
    own, again = last_evaluation(tmp_path / "run"), succeed("eval", "run", "--json").json
    assert {name: again[name] for name in own} == pytest.approx(own, rel=1e-5, abs=1e-5)
    succeed("report", "run")
    result = Path("run/final")
    if setting.adapters:
        succeed("merge", "run", "--output", "merged")
        result = Path("merged")

    reloaded: Any = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32, output_loading_info=True)
    whole, report = reloaded
    tokenizer = AutoTokenizer.from_pretrained(result)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert tokenizer.chat_template == setting.template
    text = read_text(result)
    assert text is not None
    assert text.chat_template_kwargs == setting.keywords
    ids, _ = scored(tokenizer, talks[0].prompt, talks[0].chosen, talks[0], setting.keywords)
    ends = whole.generation_config.eos_token_id
    assert int(ids[0, -1]) in (ends if isinstance(ends, list) else [ends])

    rounding = 1e-4 if setting.nf4 else 1e-5
    before: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    untrained = logits(before)
    assert (logits(whole) - untrained).norm() > 1e-2 * untrained.norm()
    if setting.adapters:
        expected = with_adapter(model, Path("run/final"), setting)
        assert (logits(whole) - expected).norm() < rounding * expected.norm()
    evaluated = succeed("eval", "run", "--data", heldout, "--json").json
    for side in ("chosen", "rejected"):
        expected = mean_logps(whole, tokenizer, talks[:5], side, setting.keywords)
        assert evaluated[f"logps/{side}"] == pytest.approx(expected, rel=rounding)


def refused(overrides: list[str]) -> None:
    """Check that preview and train refuse the data with one message about tools, before anything is written."""
    for name in ("preview", "train"):
        result = run_command(name, "cfg.toml", *overrides, *["output.dir=run"] * (name == "train"))
        assert result.status == 2
        assert "tool" in result.err
        assert "Traceback" not in result.err
    assert not Path("run").exists()


def without_lora(text: str) -> str:
    """Return the config without its [lora] table, so that the whole model is trained, as its comment says."""
    before, table = text.split("[lora]\n")
    return before + table[table.index("\n[") + 1 :]
