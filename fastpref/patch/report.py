"""The report of a patched run: counts and times, and how much the patch saved."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastpref.sizes import in_words

if TYPE_CHECKING:
    from fastpref.patch import Patch


@dataclass
class Tally:
    """Counts over all forward passes in patched methods."""

    passes: int = 0
    padded_tokens: int = 0  # tokens of TRL's rows, including padding
    computed_tokens: int = 0
    places: int = 0  # positions of TRL's rows, at all of which a plain head computes logits
    scored: int = 0
    head_seconds: float = 0.0
    logits_bytes: int = 0  # float32 logits of the largest batch of a trainer that uses its model's logits
    timed: bool = False  # whether to wait for the device, so that the head's time is measured

    def computed(self, padded: int, tokens: int) -> None:
        """Count a pass of `tokens` tokens in place of `padded`."""
        self.passes += bool(padded)
        self.padded_tokens += padded
        self.computed_tokens += tokens

    def logits(self, places: int, vocabulary: int) -> None:
        """Count a pass for which TRL's own code would have logits at this many positions."""
        self.logits_bytes = max(self.logits_bytes, 4 * places * vocabulary)

    @contextmanager
    def head(self, places: int, scored: int) -> Iterator[None]:
        """Count and time the block, in which the head scores `scored` tokens of a batch with `places` positions."""
        self.places += places
        self.scored += scored
        self._wait()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.head_seconds += time.perf_counter() - begin

    def _wait(self) -> None:
        if self.timed:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()


def report(patch: "Patch") -> str:
    """Return a text with the patched methods, counts and times, and the size of the logits that TRL would have made."""
    tally = patch.tally
    lines = [f"fastpref.patch of trl {getattr(patch.trl, '__version__', '')}"]
    owners: dict[str, list[str]] = {}
    for owner, _, name in (full.rpartition(".") for full in patch.patched):
        owners.setdefault(owner, []).append(name)
    lines += [f"  patched      {owner}: {', '.join(names)}" for owner, names in owners.items()]
    lines += [f"  left as is   {note}" for note in patch.notes]
    if not tally.passes:
        return "\n".join([*lines, "  no patched trainer has computed anything"])
    saved = tally.padded_tokens - tally.computed_tokens
    lines.append(
        f"  tokens       {tally.computed_tokens:,} computed in {tally.passes} passes where TRL's rows hold "
        f"{tally.padded_tokens:,}: {saved / tally.padded_tokens:.0%} saved by shared beginnings and by no padding"
    )
    lines.append(
        f"  head         {tally.scored:,} of {tally.places:,} places scored in {tally.head_seconds:.2f} s "
        "(measured; the backward pass of a head that is trained is not in it)"
    )
    if tally.logits_bytes:
        lines.append(
            f"  logits       none; the largest batch's would take {in_words(tally.logits_bytes)} in float32 "
            "(counted; not what TRL's peak would be)"
        )
    return "\n".join(lines)
