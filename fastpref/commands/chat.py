"""`fastpref chat`: talk to a model on a terminal, and on request also to the model that it began with."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TextIO

import peft
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from fastpref.commands.chat_lines import GREETING, lines
from fastpref.data.cache import cache_folder
from fastpref.data.rows.content import Writing
from fastpref.data.template.render import apply
from fastpref.data.template.text import check_template_keywords
from fastpref.errors import UserError
from fastpref.model.adapters.switch import only
from fastpref.model.limits import limits_of_model
from fastpref.run.trained import Trained, load_trained, trained_tokenizer

Message = dict[str, str]


@dataclass
class Speaker:
    """A model and its conversation so far."""

    name: str
    model: PreTrainedModel
    within: Callable[[], AbstractContextManager[Any]] = nullcontext  # the context in which it generates
    messages: list[Message] = field(default_factory=list)


def chat(
    trained: Trained,
    *,
    compare: bool = False,
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float | None = None,
    given: TextIO | None = None,
    out: TextIO | None = None,
    tell: Callable[[str], None] = lambda note: None,
) -> None:
    """Answer each line of `given` (default: standard input) until it ends.

    With `compare`, the model that the training began with answers first. A temperature of 0 takes the likeliest token;
    None keeps the model's own settings. `tell` is called with each note on loading the model. Raises UserError.
    """
    source: TextIO = sys.stdin if given is None else given
    screen: TextIO = sys.stdout if out is None else out
    tokenizer = trained_tokenizer(trained)
    if not tokenizer.chat_template:
        raise UserError(f"{trained.weights}: its tokenizer has no chat template; add tokens.chat_template=chatml")
    check_template_keywords(trained.config, tokenizer)
    writing = Writing(
        template_kwargs=trained.config.tokens.chat_template_kwargs, day=trained.text.day if trained.text else None
    )
    speakers = _speakers(trained, compare, tell)
    options: dict[str, Any] = {"max_new_tokens": max_tokens}
    if temperature is not None:
        options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    if source.isatty():
        print(GREETING, file=screen)
    beginning = [] if system is None else [{"role": "system", "content": system}]
    for speaker in speakers:
        speaker.messages = [*beginning]
    for line in lines(source, screen, cache_folder() / "chat_history"):
        if line.command == "/system":
            beginning = [{"role": "system", "content": line.text}] if line.text else []
        if line.command in ("/clear", "/system"):
            for speaker in speakers:
                speaker.messages = [*beginning]
            continue
        question = line.text
        if line.command == "/retry":
            if len(speakers[0].messages) == len(beginning):
                print("there is no question yet", file=screen)
                continue
            question = speakers[0].messages[-2]["content"]
            for speaker in speakers:
                del speaker.messages[-2:]
        for speaker in speakers:
            if compare:
                print(f"{speaker.name}: ", end="", file=screen, flush=True)
            speaker.messages.append({"role": "user", "content": question})
            answer = _answer(speaker, tokenizer, writing, options, screen)
            speaker.messages.append({"role": "assistant", "content": answer})


def _speakers(trained: Trained, compare: bool, tell: Callable[[str], None]) -> list[Speaker]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = replace(trained, config=trained.config.but({"reference": {}}))  # the model that the training began with
    loaded = load_trained(trained, device, reference=compare)
    for note in loaded.notes:
        tell(note)
    after = Speaker("trained", loaded.model)
    if not compare:
        return [after]
    if trained.began_with is None:
        raise UserError(f"--compare: {trained.weights} is not known to be trained from another model")
    if isinstance(loaded.wrapped, peft.PeftModel):
        return [Speaker("before", loaded.model, partial(only, loaded.model, loaded.reference.names)), after]
    return [Speaker("before", load_trained(trained, device, base=True).model), after]


@torch.no_grad()
def _answer(
    speaker: Speaker, tokenizer: PreTrainedTokenizerBase, writing: Writing, options: dict[str, Any], out: TextIO
) -> str:
    """Generate and print the answer to the last message. Ctrl-C ends it early. Raises UserError if there is no room."""
    text = apply(tokenizer, speaker.messages, writing, generation_prompt=True)
    ids: Any = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(speaker.model.device)
    limits, length = limits_of_model(speaker.model), ids["input_ids"].shape[1]
    room = limits.room(length, options["max_new_tokens"])
    if room == 0:
        raise UserError(
            f"the conversation has {length:,} tokens, and {limits.model} has {limits.positions:,} positions: it cannot "
            "go on; begin a new one"
        )
    streamer = _Streamer(tokenizer, out)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with speaker.within():
        try:
            speaker.model.generate(  # pyright: ignore[reportCallIssue]
                **ids, streamer=streamer, use_cache=True, pad_token_id=pad, **options | {"max_new_tokens": room}
            )
        except KeyboardInterrupt:
            streamer.end()
    return streamer.text.strip()


class _Streamer(TextStreamer):
    """Prints whole words as they are generated, without control characters, which would steer the terminal."""

    def __init__(self, tokenizer: Any, out: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self._out = "", out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        shown = "".join(c for c in text if c.isprintable() or c in "\n\t")
        print(shown, end="\n" if stream_end else "", file=self._out, flush=True)
