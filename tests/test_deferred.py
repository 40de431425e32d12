"""Modules that most runs never use are imported when they are needed, and are then the real ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import LORA, write_config

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


# Stand-ins are asked the same questions before and after something needs the real modules.
OTHERS = """
import sys, torch, transformers
from fastpref.deferred import _StandIn, defer_compiler, defer_sharding
defer_compiler()
defer_sharding()
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import expect_true, guard_or_false, sym_and, sym_eq, sym_or, is_nested_int
from sympy import Basic

def absent(): return {name for name, module in sys.modules.items() if isinstance(module, _StandIn)}

def ask():
    assert expect_true(True) and not guard_or_false(False) and not is_nested_int(3)
    assert sym_and(True, True, True) and not sym_or(False, False) and sym_eq((2, 3), (2, 3)) and not sym_eq((2,), (3,))
    assert not isinstance(torch.ones(2), DTensor) and not isinstance(1, Basic)
    with torch.device("meta"):
        assert (1.0 / (1e4 ** (torch.arange(0, 8, 2, dtype=torch.float) / 8))).shape == (4,)
        assert torch.nn.Embedding(5, 2).weight.shape == (5, 2)

ask()
"""
NEEDED = {
    "a symbol": (
        "import sympy\nx = sympy.Symbol('x')\nassert isinstance(x, Basic) and issubclass(sympy.Symbol, Basic)",
        "sympy",
    ),
    "a fake tensor": (
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv\n"
        "with FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False) as mode:\n"
        "    fake = mode.from_tensor(torch.ones(3, 4))\n"
        "    assert expect_true(fake.shape[0] > 1) and sym_eq(fake.shape[0], fake.shape[0])",
        "torch.fx.experimental.symbolic_shapes",
    ),
    "a sharded tensor": (
        "import torch.distributed as dist\n"
        "store = dist.HashStore()\n"
        "dist.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.tensor import Shard, distribute_tensor\n"
        "sharded = distribute_tensor(torch.ones(4), init_device_mesh('cpu', (1,)), [Shard(0)])\n"
        "from fastpref.sharding import is_sharded\n"
        "assert isinstance(sharded, DTensor) and is_sharded(sharded) and not is_sharded(torch.ones(4))\n"
        "assert torch.equal(DTensor.from_local(torch.ones(4), sharded.device_mesh).full_tensor(), torch.ones(4))",
        "torch.distributed.tensor",
    ),
}


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


@pytest.mark.parametrize("need", NEEDED)
def test_what_stands_in_gives_way_to_the_real_module(need: str):
    """Before and after, the same questions have the same answers, also for those who hold a stand-in's function."""
    code, name = NEEDED[need]
    run(f"{OTHERS}assert {name!r} in absent()\n{code}\nassert {name!r} not in absent()\nask()")


def test_a_run_on_a_cpu_needs_nothing_that_is_deferred(tmp_path: Path):
    """A command that trains adapters imports neither the compiler, nor symbols, nor sharded tensors."""
    config = write_config(tmp_path)
    code = (
        "import atexit, sys\n"
        "from fastpref.cli import console\n"
        "from fastpref.deferred import _StandIn\n"
        "names = {'sympy', 'torch._dynamo', 'torch.distributed.tensor', 'torch.fx.experimental.symbolic_shapes'}\n"
        "def check():\n"
        "    left = {name for name in names if isinstance(sys.modules[name], _StandIn)}\n"
        "    print('loaded:', sorted(names - left))\n"
        "atexit.register(check)\n"
        f"sys.argv = ['fastpref', 'train', {str(config)!r}, 'output.dir={tmp_path / 'run'}', {LORA!r}]\n"
        "console()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("loaded: []\n"), result.stdout
