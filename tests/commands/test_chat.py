"""`fastpref chat`: the model's answers, as they are generated, for a person and for a pipe."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.commands import chat as chats
from fastpref.commands.chat import chat
from fastpref.errors import UserError
from fastpref.run.trained import find_trained
from tests.support.command_line import run_command
from tests.support.paths import QUICKSTART_MODEL

MODEL = QUICKSTART_MODEL


def generated(run: Path | None, questions: list[str]) -> list[str]:
    """Return the greedy answers of transformers and PEFT to a conversation."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    if run is not None:
        model = PeftModel.from_pretrained(model, run / "final")
    messages, answers = [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


QUESTIONS = ["What is four plus five?", "And the colour of grass?"]


def test_a_pipe_is_answered_line_by_line(finished_run: Path):
    """Only the answers are printed, and they are those of PEFT's own generation with the conversation so far."""
    given = "\n".join([QUESTIONS[0], "", QUESTIONS[1]])
    result = run_command("chat", finished_run, "--temperature", "0", "--max-tokens", "12", given=given)
    assert (result.status, result.err) == (0, "")
    assert [line.strip() for line in result.out.splitlines()] == generated(finished_run, QUESTIONS)


def test_compared_with_the_model_before(finished_run: Path):
    """Both models answer in their own conversation, and /clear restarts both."""
    out = io.StringIO()
    given = io.StringIO("\n".join([*QUESTIONS, "/clear", QUESTIONS[1]]))
    chat(find_trained(str(finished_run)), compare=True, temperature=0, max_tokens=12, given=given, out=out)
    lines = [line.strip() for line in out.getvalue().splitlines()]
    before = [*generated(None, QUESTIONS), *generated(None, QUESTIONS[1:])]
    after = [*generated(finished_run, QUESTIONS), *generated(finished_run, QUESTIONS[1:])]
    assert lines == [
        f"{who}: {text}".strip() for pair in zip(before, after) for who, text in zip(("before", "trained"), pair)
    ]


def test_ctrl_c_ends_an_answer_and_not_the_conversation(finished_run: Path, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C ends an answer, whose beginning stays, and the next question is answered."""
    out, seen = io.StringIO(), []
    whole = chats._Streamer.on_finalized_text

    def interrupted(self: chats._Streamer, text: str, stream_end: bool = False) -> None:
        whole(self, text, stream_end)
        seen.append(text)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(chats._Streamer, "on_finalized_text", interrupted)
    given = io.StringIO("\n".join(QUESTIONS))
    chat(find_trained(str(finished_run)), temperature=0, max_tokens=12, given=given, out=out)
    first, *others = out.getvalue().splitlines()
    assert generated(finished_run, QUESTIONS[:1])[0].startswith(first.strip())
    assert others


def test_control_characters_do_not_reach_the_terminal():
    out = io.StringIO()
    streamer = chats._Streamer(AutoTokenizer.from_pretrained(MODEL), out)
    streamer.on_finalized_text("a\x1b[31mb\n", stream_end=True)
    assert out.getvalue() == "a[31mb\n\n"
    assert streamer.text == "a\x1b[31mb\n"


def test_there_must_be_something_to_compare_with():
    with pytest.raises(UserError, match="not known to be trained from another"):
        chat(find_trained(str(MODEL)), compare=True, given=io.StringIO(""), out=io.StringIO())
