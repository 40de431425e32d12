"""Torch's compiler is not imported before it is needed, and is then the real one, whatever asks for it."""

import subprocess
import sys

import pytest

BEGIN = """
import sys, torch
from fastpref.deferred import defer_compiler, import_bitsandbytes
defer_compiler()
stand_in = sys.modules["torch._dynamo"]

@torch._dynamo.disable
def left(x): return x + 1

@torch._dynamo.allow_in_graph
def allowed(x): return x * 2

def waits(): return "disallow_in_graph" not in vars(sys.modules["torch._dynamo"])
"""
# How the compiler comes to be needed; each is followed by the same checks.
NEEDS = {
    "a module of it": "import torch._dynamo.utils",
    "an attribute": "torch._dynamo.reset()",
    "compiling": "torch.compile(lambda x: x.sin(), backend='eager')(torch.ones(2))",
}
CHECKS = """
assert not waits()
import torch._dynamo, torch._dynamo.utils, torch._dynamo.config
assert sys.modules["torch._dynamo"] is stand_in is torch._dynamo
assert sys.modules["torch._dynamo.utils"] is torch._dynamo.utils and torch._dynamo.utils.counters is not None
from torch._dynamo.trace_rules import _allowed_callable_ids
assert id(allowed) in _allowed_callable_ids.function_ids
seen = []
def backend(graph, inputs):
    seen.append(len(graph.graph.nodes)); return graph.forward
assert torch.equal(torch.compile(lambda x: left(x.sin()).cos(), backend=backend)(torch.ones(2)),
                   (torch.ones(2).sin() + 1).cos())
assert len(seen) == 2  # before and after the function that is left out
"""
TRAINED = """
import_bitsandbytes()
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(2)).sum().backward()
optimizer.step()
from transformers import AutoModelForCausalLM
import fastpref.training.start
assert left(1) == 2 and allowed(1) == 2
assert waits() and "torch._inductor" not in sys.modules
"""


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("need", NEEDS)
def test_whatever_needs_the_compiler_gets_the_real_one(need: str):
    """One module of its name exists, with what was registered before it was loaded."""
    run(f"{BEGIN}assert waits()\n{NEEDS[need]}\n{CHECKS}")


def test_neither_imports_nor_a_step_load_the_compiler():
    """All that a run imports, and a step of torch's optimizer, leave the compiler alone."""
    run(f"{BEGIN}{TRAINED}")
