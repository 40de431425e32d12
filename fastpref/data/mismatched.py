"""Pair KTO's prompts with completions of other prompts, from which its KL is estimated."""

from collections.abc import Iterator, Sequence

from fastpref.data.batch import completion_key
from fastpref.data.example import Example


def with_mismatched(examples: Sequence[Example]) -> list[Example]:
    """Return every prompt with its own completion and a mismatched one, which KTO's KL estimate needs.

    The mismatched completion is that of the next example, cyclically, that has another prompt, or of the next one if
    all prompts are equal.
    """
    mates = []
    for at, example in enumerate(examples):
        following = [*range(at + 1, len(examples)), *range(at)] or [at]
        mates.append(next((i for i in following if examples[i].prompt != example.prompt), following[0]))
    return [e.with_completions([(e, 0), (examples[mate], 0)]) for e, mate in zip(examples, mates)]


def mismatched(examples: Sequence[Example]) -> Iterator[Example]:
    """Yield every prompt with the completion of an example of another prompt, if there is one, in the examples' order.

    The choice does not depend on the order of the examples: prompts form a ring sorted by the digests of their tokens,
    and each takes the completions of the next, in the order of their digests.
    """
    prompts: dict[bytes, list[tuple[bytes, int]]] = {}
    places = []
    for at, example in enumerate(examples):
        prompt = completion_key(example.prompt, ())
        own = completion_key(example.prompt, example.completions[0], example.context(0))
        prompts.setdefault(prompt, []).append((own + bytes([bool(example.label)]), at))
        places.append(prompt)
    ring = sorted(prompts)
    mates = [0] * len(places)
    for number, prompt in enumerate(ring):
        own, following = sorted(prompts[prompt]), sorted(prompts[ring[(number + 1) % len(ring)]])
        for turn, (_, at) in enumerate(own):
            mates[at] = following[(turn + (len(ring) == 1)) % len(following)][1]
    for at, mate in enumerate(mates):
        example = examples[at]
        yield example.with_completions([(examples[mate], 0)])
