"""Write token ids as readable text: every character is visible, and colours or marks show the use of each token."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rich.text import Text
from transformers import PreTrainedTokenizerBase

_HEAD, _TAIL = 120, 40  # tokens that are shown at the beginning and the end of a long part


class Use(Enum):
    """The use of a token, with its words, its style for colour output, and its marks for output without colour."""

    PROMPT = ("prompt", "", "", "")
    SCORED = ("scored", "green", "[[", "]]")
    CONTEXT = ("not scored", "", "", "")
    ACROSS = ("begins in the prompt", "black on yellow", "<<", ">>")
    END = ("end token", "bold reverse green", "{{", "}}")
    CUT = ("cut", "bold red", "", "")
    MORE = ("not shown", "dim", "", "")

    @property
    def words(self) -> str:
        return self.value[0]

    @property
    def style(self) -> str:
        return self.value[1]

    @property
    def marks(self) -> tuple[str, str]:
        return self.value[2], self.value[3]


_SPECIAL = "magenta"  # the style of special tokens in a prompt


@dataclass(frozen=True)
class Piece:
    """The text of tokens that can only be decoded together."""

    text: str
    use: Use
    special: bool = False


class Writer:
    """Writes parts of sequences, with colours or else with marks; with `full`, long parts are not shortened."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, colour: bool, full: bool = False):
        self._tokenizer, self._colour, self._full = tokenizer, colour, full
        self._special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)

    def prompt(self, ids: Sequence[int], *, scored: bool, cut: int, turns: int = 0) -> Text:
        """Write the tokens of a prompt.

        `scored`: whether all tokens except the first are scored. `cut`: the number of removed tokens. `turns`: the
        number of whole turns removed; 0 if the tokens were removed from the beginning of a text.
        """
        uses = [Use.SCORED if scored and at else Use.PROMPT for at in range(len(ids))]
        pieces = self._pieces([], ids, uses)
        gone = f"({turns} oldest turns, {cut} tokens, left out)\n" if turns else f"({cut} tokens cut) …"
        return self._text([Piece(gone, Use.CUT)] * (cut > 0 or turns > 0) + pieces)

    def completion(
        self, prompt: Sequence[int], ids: Sequence[int], scored: Sequence[bool], *, across: bool, cut: int
    ) -> Text:
        """Write the tokens of a completion after its prompt; `across`: whether the first token begins in the prompt."""
        uses = [Use.SCORED if is_scored else Use.CONTEXT for is_scored in scored]
        if not cut:
            uses[-1] = Use.END
        if across:
            uses[0] = Use.ACROSS
        pieces = self._pieces(prompt, ids, uses)
        return self._text(pieces + [Piece(f"… ({cut} tokens cut)", Use.CUT)] * (cut > 0))

    def legend(self) -> Text:
        uses = [use for use in Use if use.style and use not in (Use.CUT, Use.MORE)]
        parts = [self._text([Piece(use.words, use)]) for use in uses]
        return Text("  ").join([*parts, Text("↵ line end"), Text("· space")])

    def _pieces(self, before: Sequence[int], ids: Sequence[int], uses: Sequence[Use]) -> list[Piece]:
        """Decode `ids` after `before`. Tokens that are parts of one character and have one use form one piece."""
        spans = decoded(self._tokenizer, [*before, *ids], len(before), uses)
        pieces = [
            Piece(text, uses[start], special=stop - start == 1 and ids[start] in self._special)
            for start, stop, text in spans
        ]
        if self._full or len(pieces) <= _HEAD + _TAIL + 10:
            return pieces
        hidden = spans[-_TAIL][0] - spans[_HEAD][0]
        return [*pieces[:_HEAD], Piece(f" … {hidden} more tokens … ", Use.MORE), *pieces[-_TAIL:]]

    def _text(self, pieces: Sequence[Piece]) -> Text:
        runs: list[tuple[str, str]] = []  # texts with their styles
        for at, piece in enumerate(pieces):
            follows = pieces[at + 1].text[:1] if at + 1 < len(pieces) else ""
            shown = visible(piece.text, follows) if piece.use not in (Use.CUT, Use.MORE) else piece.text
            style = _SPECIAL if piece.special and piece.use is Use.PROMPT else piece.use.style
            if not self._colour:
                style, shown = "", self._marked(shown, piece.use, pieces[:at][-1:], pieces[at + 1 : at + 2])
            if runs and runs[-1][1] == style:
                shown = runs.pop()[0] + shown
            runs.append((shown, style))
        text = Text.assemble(*runs)
        text.rstrip()
        return text

    def _marked(self, shown: str, use: Use, before: Sequence[Piece], after: Sequence[Piece]) -> str:
        """Add the marks of a use to text at which a run of that use begins or ends."""
        opens, closes = use.marks
        begins = not before or before[0].use is not use
        ends = not after or after[0].use is not use
        if ends and closes and shown.endswith("\n"):
            shown = shown[:-1]  # the closing mark belongs on the line of the marked text
        return opens * begins + shown + closes * ends


def decoded(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], first: int, uses: Sequence[Use]
) -> list[tuple[int, int, str]]:
    """Return the text of the tokens from `first` on as (start, stop, text), with positions counted from `first`.

    Each token is decoded after its predecessors, because some decoders remove a space at the beginning of a text. The
    tokens of one character are one span, unless they differ in use.
    """

    def decode(start: int, stop: int) -> str:
        return str(tokenizer.decode(list(ids[start:stop]), clean_up_tokenization_spaces=False))

    spans = []
    context, start = max(0, first - 4), first
    for stop in range(first + 1, len(ids) + 1):
        before, now = decode(context, start), decode(context, stop)
        unfinished = now.endswith("\ufffd") and stop < len(ids) and stop - start < 8
        if unfinished and uses[stop - first] is uses[start - first]:
            continue
        spans.append((start - first, stop - first, now[len(before) :]))
        context, start = start, stop
    return spans


def visible(text: str, follows: str = "") -> str:
    """Make every character visible: line ends as ↵, tabs as →, spaces before these as ·, others by their number.

    `follows` is the character after the text.
    """
    shown = []
    for at, letter in enumerate(text):
        if letter == "\n":
            shown.append("↵\n")
        elif letter == " ":
            after = text[at + 1 :].lstrip(" ")[:1] or follows
            shown.append("·" if after in ("", "\n", "\r", "\t") else " ")
        elif letter == "\t":
            shown.append("→")
        elif ord(letter) < 32:
            shown.append(chr(0x2400 + ord(letter)))
        elif unicodedata.category(letter)[0] in "CZ":
            shown.append(f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}")
        else:
            shown.append(letter)
    return "".join(shown)
