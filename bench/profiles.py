"""The profiles of `python -m bench`, each with the cases that it measures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench.measure import Case
from bench.objectives import DPO, KTO, ORPO, SIMPO, TOKENS, Objective
from bench.prefixes import Prefixes
from bench.problems import SHAPES, Shape
from bench.step_data import StepShape
from bench.streaming import StreamedSteps

LOSSES = (DPO, KTO, ORPO, SIMPO)
ALL = tuple(shape.model for shape in SHAPES)


@dataclass(frozen=True)
class HeadCases:
    models: tuple[str, ...]
    objectives: tuple[Objective, ...]
    passes: tuple[str, ...] = ("frozen",)


@dataclass(frozen=True)
class Profile:
    divisor: int  # divides the vocabularies, not the width, which decides the share of the softmax
    repeats: int
    heads: tuple[HeadCases, ...]
    tokens: tuple[int, int, int]  # pairs, length, prompt of a head's problem
    scaled: str  # the model whose head is scaled
    factors: tuple[int, ...]
    steps: tuple[StepShape, ...]
    methods: tuple[str, ...]
    losses: tuple[int, int]  # pairs and tokens per completion for the losses without their head
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def shape(self, model: str) -> Shape:
        known = next(shape for shape in SHAPES if shape.model == model)
        pairs, length, prompt = self.tokens
        return replace(known, vocab=known.vocab // self.divisor, pairs=pairs, length=length, prompt=prompt)

    def cases(self, words: Sequence[str] = ()) -> list[Case]:
        """Return the cases of the head whose name contains all of the words."""
        everything = [
            Case(self.shape(model), objective, passes, self.dtype, self.device)
            for heads in self.heads
            for model in heads.models
            for objective in heads.objectives
            for passes in heads.passes
        ]
        return [case for case in everything if set(words) <= set(case.name.split())]

    @property
    def rule(self) -> str:
        """Describe in words how the shapes derive from those of the models."""
        pairs, length, prompt = self.tokens
        size = "as they are" if self.divisor == 1 else f"with their vocabulary divided by {self.divisor}"
        what = f"a pair of {length:,} tokens a side" if pairs == 1 else f"{pairs} pairs of {length:,} tokens a side"
        return (
            f"Heads of real models {size}, {str(self.dtype).removeprefix('torch.')}; {what}, {prompt:,} of them prompt "
            "and not scored. Bare products are the matrix products that nothing can do without, over the scored tokens "
            "and nothing else; × bare is the median of the ratios of each turn, ± the distance of p20 or p80, the "
            "larger. DPO and KTO compute the reference's head too. Extra MiB is the most that torch's allocator held "
            f"in addition to the inputs. {self.repeats} turns."
        )


def _varied(step: StepShape, **values: tuple[float, ...]) -> tuple[StepShape, ...]:
    """Return the step, and copies in each of which one field has another value."""
    return step, *(replace(step, **{name: value}) for name, others in values.items() for value in others)


TINY = Profile(
    divisor=16,
    repeats=5,
    heads=(HeadCases(("SmolLM2-135M",), (TOKENS, ORPO)),),
    tokens=(1, 128, 64),
    scaled="SmolLM2-135M",
    factors=(1, 2),
    steps=(StepShape(hidden=64, layers=2, vocab=2048, length=96, prompt_share=0.5, batch=2, rows=4),),
    methods=("orpo",),
    losses=(2, 64),
)
_STEP = StepShape(hidden=256, layers=4, vocab=16384, length=256, prompt_share=0.5, batch=2, rows=8)
QUICK = Profile(
    divisor=32,
    repeats=3,
    heads=(
        HeadCases(ALL, (TOKENS,)),
        HeadCases(("Llama-3.2-1B",), (TOKENS,), ("forward", "trained")),
        HeadCases(("Llama-3.2-1B",), LOSSES),
    ),
    tokens=(1, 256, 128),
    scaled="Qwen2.5-0.5B",
    factors=(1, 2, 4),
    steps=(_STEP,),
    methods=("dpo", "orpo"),
    losses=(8, 256),
)
FULL = Profile(
    divisor=4,
    repeats=7,
    heads=(HeadCases(ALL, (TOKENS, *LOSSES), ("forward", "frozen", "trained")),),
    tokens=(1, 512, 256),
    scaled="Llama-3.2-1B",
    factors=(1, 2, 4, 8),
    steps=_varied(_STEP, prompt_share=(0.2, 0.8), length=(128, 512), vocab=(4096, 65536), batch=(1, 4)),
    methods=("dpo", "ipo", "kto", "orpo", "simpo"),
    losses=(16, 1024),
)
_GPU_STEP = StepShape(hidden=1024, layers=16, vocab=128256, length=1024, prompt_share=0.5, batch=8, rows=64)
GPU = Profile(
    divisor=1,
    repeats=20,
    heads=FULL.heads,
    tokens=(4, 1024, 512),
    scaled="Llama-3-8B",
    factors=(1, 2, 4, 8),
    steps=_varied(_GPU_STEP, prompt_share=(0.2, 0.8), length=(512, 2048), vocab=(32064,), batch=(4, 16)),
    methods=FULL.methods,
    losses=(64, 1024),
    dtype=torch.bfloat16,
    device="cuda",
)
# A selection of these cases, meant to take about a quarter of an hour; nobody has timed it on a GPU.
GPU_QUICK = replace(
    GPU,
    repeats=10,
    heads=(
        HeadCases(("Llama-3.2-1B", "Qwen2.5-7B", "Gemma-2-2B"), (TOKENS,)),
        HeadCases(("Llama-3-8B",), (TOKENS,), ("forward", "frozen", "trained")),
        HeadCases(("Llama-3-8B",), LOSSES),
    ),
    factors=(1, 2),
    steps=(_GPU_STEP,),
    methods=("dpo", "orpo"),
)
PREFIXES = Prefixes(
    shape=StepShape(hidden=256, layers=4, vocab=4096, length=512, prompt_share=0.5, batch=6, rows=6),
    tool_tokens=1000,
    completions=4,
    turns=4,
    longest=512,
    repeats=3,
)
STREAMING = StreamedSteps(
    shape=StepShape(hidden=256, layers=6, vocab=4096, length=512, prompt_share=0.5, batch=4, rows=4),
    quantizations=("none", "nf4"),
    longest=512,
    repeats=5,
)
# A layer of 100 MiB in bfloat16, and micro-batches around the tokens at which its copy should hide.
STREAMING_GPU = replace(
    STREAMING, shape=replace(STREAMING.shape, hidden=2048, layers=12, vocab=32768, batch=8), longest=1024, repeats=10
)
PROFILES = {"tiny": TINY, "quick": QUICK, "full": FULL, "gpu-quick": GPU_QUICK, "gpu": GPU}
