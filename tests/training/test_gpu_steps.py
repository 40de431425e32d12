"""What a GPU is given to do in a run, traced on fake CUDA tensors through `fastpref.train` itself.

In a training step and an evaluation the host waits for the GPU only where the tables below allow it; no tensor is on
another device than those it meets, no product is in float32 where autocast means half precision, and no weight that is
trained is in half precision. An entry that no longer happens fails as well, so that the tables say what is there.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import PartialState

from bench.compile_report import variants
from tests.support.pairwise import Row, covering, whole_product
from tests.support.trace import Launch
from tests.support.traced_runs import Part, TracedRun, traced_run

LORA, EVERY = "lora={rank=4}", "train.checkpointing=true"
TRAINED = {"lora": [LORA], "nf4": [LORA, "model.quantization=nf4"], "full": []}
SAVED = {"all": [], "inputs": [EVERY], "inputs on the host": [EVERY, "train.offload_activations=true"]}
FACTORS = {
    "loss": ["dpo", "ipo", "kto", "orpo", "simpo", "cpo", "pl", "lipo", "sft"],
    "trained": list(TRAINED),
    "attention": ["flex", "sdpa"],
    "liger": [True, False],
    "saved": list(SAVED),
    "tokens_per_microbatch": [2000, 120],  # the step is one micro-batch, or several
}
USUAL = covering(FACTORS)
OTHERS = [row for row in whole_product(FACTORS) if row not in USUAL and row["tokens_per_microbatch"] == 120]


def overrides(row: Row) -> list[str]:
    """Return a row of a table of FACTORS as overrides of a config."""
    given = [f"loss.type={row['loss']}", f"model.attention={row['attention']}", f"model.liger={row['liger']}".lower()]
    given.append(f"train.tokens_per_microbatch={row['tokens_per_microbatch']}")
    return [*given, *TRAINED[row["trained"]], *SAVED[row["saved"]]]


# --- what is allowed --------------------------------------------------------------------------------------------------

Count = Callable[[Part], int]


def walks(part: Part) -> int:
    """Return how often the head was computed."""
    return part.operations.count("fastpref::linear_logprob")


def always(count: int) -> Count:
    return lambda part: count


def launches(kernel: str) -> Count:
    return lambda part: part.launched(kernel)


def updates(part: Part) -> int:
    return part.operations.count("aten::_fused_adamw_")


@dataclass(frozen=True)
class Allowed:
    """An event that a part of a run has, how often, and why it is allowed."""

    kind: str
    place: str
    count: Count
    why: str


HEAD_ROWS = Allowed(
    "wait",
    "fastpref/kernels/head_weight.py:OffloadedWeight.gather",
    lambda part: 2 * part.launched("_gradient_kernel"),
    "rows of a head in host memory are gathered there, at the end of a walk whose slices all came from there",
)
NORM = Allowed(
    "wait",
    "fastpref/training/loop.py:TrainingRun._update",
    always(1),
    "the gradient's norm: a step that is not finite must not change the weights",
)


def metrics(completions: int) -> list[Allowed]:
    """Return the reads of metrics, behind the norm's, where the device has nothing left to do."""
    place = "fastpref/step/metrics.py:"
    return [
        Allowed("wait", f"{place}_numbers", always(2), "all sums, and all counts"),
        Allowed("wait", f"{place}_on_host", always(completions), "rewards and lengths of completions, KTO's labels"),
    ]


def check(run: TracedRun, given: list[str], further: list[Allowed] | None = None) -> None:
    """Check that the parts of a run have exactly what is allowed, and `further` events."""
    columns = 3 if "loss.type=kto" in given else 0 if "loss.type=sft" in given else 2  # SFT has no rewards
    everywhere = further or []
    differences = [
        *_differences("step", run.step, [NORM, *metrics(columns), *everywhere]),
        # Rewards are read for the metrics, and for the intervals of the report.
        *_differences("evaluation", run.evaluation, [*metrics(2 * columns), *everywhere]),
        *_differences("reference beforehand", run.precomputing, everywhere),
    ]
    assert not differences, "\n".join(differences)


def _differences(name: str, part: Part, allowed: list[Allowed]) -> list[str]:
    found = part.counted()
    expected = Counter({(entry.kind, entry.place): entry.count(part) for entry in allowed})
    words = {(event.kind, event.place): event.operation for event in part.events}
    return [
        f"{name}: {kind} at {place} ({words.get((kind, place), 'gone')}): {found[kind, place]} times, "
        f"{expected[kind, place]} allowed"
        for kind, place in sorted(found.keys() | expected.keys())
        if found[kind, place] != expected[kind, place]
    ]


# --- the tests --------------------------------------------------------------------------------------------------------


def check_row(folder: Path, row: Row) -> None:
    given = overrides(row)
    run = traced_run(folder, *given)
    check(run, given)
    assert run.step.launched("_walk_kernel") >= 1
    assert (run.step.launched("_rms_norm_forward_kernel") > 0) == row["liger"]
    assert run.step.operations.count("fake_cuda::attention") > 0
    assert updates(run.step) > 0


@pytest.mark.parametrize("row", USUAL, ids=lambda row: "-".join(map(str, row.values())))
def test_every_two_options(row: Row, tmp_path: Path):
    """Every two options of loss, trained weights, attention, kernels, stored activations and micro-batches."""
    check_row(tmp_path, row)


@pytest.mark.slow
@pytest.mark.parametrize("loss", FACTORS["loss"])
def test_all_options(loss: str, tmp_path: Path):
    """Every combination of options."""
    for number, row in enumerate(row for row in OTHERS if row["loss"] == loss):
        check_row(tmp_path / str(number), row)


OTHER_RUNS = [
    ("gemma2", [LORA]),
    ("qwen3", [LORA, "train.layout=packed", "reference.mode=copy"]),
    ("gpt-oss", [LORA, "loss.type=simpo"]),
    ("mixtral", [LORA, "train.layout=padded", EVERY]),
    ("qwen3-moe", [LORA, "model.quantization=nf4"]),
    ("llama-tied", ['loss={type="dpo", variants=["aot"]}']),
    ("llama", [LORA, 'loss={type="dpo", weighting=true}']),
    ("llama", ["loss.type=orpo", "loss.nll_on=all"]),
    ("llama", [LORA, "reference.mode=precompute", "loss.type=kto"]),
    ("llama", ['lora={rank=4, target=["lm_head", "q_proj"]}']),
    ("llama", ['lora={rank=4, modules_to_save=["lm_head"]}']),
    ("llama", ["loss.type=orpo", "train.optimizer=muon"]),
    ("llama", ["lora={rank=4, plus_ratio=8.0}", "train.optimizer=schedule_free_adamw"]),
]


@pytest.mark.parametrize(("kind", "given"), OTHER_RUNS, ids=str)
def test_other_models_and_options(kind: str, given: list[str], tmp_path: Path):
    """Softcaps, sinks, experts, other layouts and references, losses of the whole step, and a trained head."""
    check(traced_run(tmp_path, *given, kind=kind), given)


def test_adafactor_makes_its_state_on_the_host(tmp_path: Path):
    """In its first step, which is the one that is traced, transformers' Adafactor copies new rows and columns."""
    given = [LORA, "train.optimizer=adafactor"]
    made = Allowed(
        "wait",
        "transformers/optimization.py:Adafactor.step",
        lambda part: 2 * part.operations.count("aten::rsqrt_"),  # which each matrix has one of
        "the state is made on the host, once in a run",
    )
    check(traced_run(tmp_path, *given), given, [made])


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("qwen3", [LORA, "model.streaming=true"]),
        ("llama-tied", [LORA, "model.streaming=true", "model.quantization=nf4", "loss.type=kto"]),
        ("gemma2", [LORA, "model.streaming=true", EVERY, "train.offload_activations=true", "loss.type=orpo"]),
    ],
    ids=str,
)
def test_streamed_layers(kind: str, given: list[str], tmp_path: Path):
    """A streamed model has the fused head and liger's kernels, and the host waits for the token ids of no pass."""
    run = traced_run(tmp_path, *given, kind=kind)
    assert any(note.startswith("streaming: 2 of 2 layers") for note in run.notes)
    assert not any("own code" in note or "not taken" in note for note in run.notes)
    assert run.step.launched("_walk_kernel") > 0
    check(run, given, [HEAD_ROWS])


@pytest.mark.parametrize("given", [[LORA, "model.streaming=true"], ["loss.type=orpo"]], ids=str)
def test_a_gpu_without_a_number_is_one_with_it(given: list[str], tmp_path: Path):
    """Accelerate's device is "cuda", which does not equal a tensor's "cuda:0": nothing may depend on that."""
    numbered = property(lambda state: torch.device("cuda", 0))
    without = traced_run(tmp_path / "without", *given)
    with mock.patch.object(PartialState, "default_device", numbered):
        numbered = traced_run(tmp_path / "with", *given)
    assert [note for note in numbered.notes if "on cuda:0" in note]
    for one, other in ((without.step, numbered.step), (without.evaluation, numbered.evaluation)):
        assert one.operations == other.operations
        assert one.events == other.events
        assert one.launches == other.launches


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 0)])
def test_other_cards(capability: tuple[int, int], tmp_path: Path):
    """A T4 computes in float16, with a scaled loss and the library's products in the head; nothing waits there."""
    run = traced_run(tmp_path, LORA, capability=capability)
    check(run, [LORA])
    assert ("aten::_amp_foreach_non_finite_check_and_unscale_" in run.step.operations) == (capability < (8, 0))


def test_launches_are_those_that_the_compile_report_compiles(tmp_path: Path):
    """Every main loop of these runs has the tile, the mode and the dtypes of a kernel that the report compiles."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    compiled = {
        (v.architecture, _NAMES[v.constants["MODE"]], types[v.dtype], v.tile.warps, v.tile.stages, *_tile(v.constants))
        for v in variants()
        if v.tile is not None
    }
    given = [[LORA], ["loss.type=orpo"], [LORA, "loss.type=kto", "model.attention=sdpa"]]
    for number, (kind, capability) in enumerate([("llama", (9, 0)), ("gemma2", (8, 9)), ("llama", (7, 5))]):
        run = traced_run(tmp_path / str(number), *given[number], kind=kind, capability=capability)
        walks = [launch for launch in (*run.step.launches, *run.evaluation.launches) if launch.kernel == "_walk_kernel"]
        assert walks
        for walk in walks:
            assert (capability[0] * 10 + capability[1], *_main_loop(walk)) in compiled


_NAMES = {0: "forward", 1: "exp", 2: "gradient"}


def _tile(constants: dict[str, Any]) -> list[Any]:
    return [constants[name] for name in ("FUSED", "BLOCK_N", "BLOCK_V", "BLOCK_H", "PRECISION")]


def _main_loop(walk: Launch) -> tuple[Any, ...]:
    mode, constants = _NAMES[walk.constants["MODE"]], walk.constants
    operands = ["p_hidden", "p_weight", *([] if mode == "forward" else ["p_tile"])]
    (dtype,) = {walk.dtypes[name] for name in operands}
    return mode, dtype, constants["num_warps"], constants["num_stages"], *_tile(constants)
