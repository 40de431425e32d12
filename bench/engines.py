"""One engine trains on given rows in a process of its own: `python -m bench.engines JOB` prints its numbers as JSON.

Every engine has TRL 1.16's defaults, except what a Job says and LoRA of rank 16: its learning rate and the parameters
of its losses, gradient checkpointing, no packing, and the reference computed in every step. Weights are bfloat16 on a
GPU and float32 on a CPU.
"""

import json
import os
import resource
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from bench.shares import Shares, shares

ENGINES = {"trl": "TRL", "trl-liger": "TRL with Liger", "trl-patched": "TRL, patched", "fastpref": "fastpref"}
ELSEWHERE = {  # engines that are in no run, and why
    "Unsloth": "its steps need a GPU and TRL before 1.16; its head is in the table of heads",
    "ms-swift": "its packed rows need FlashAttention on a GPU; its memory is counted by bench.trainer_memory",
}
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Job:
    engine: str  # one of ENGINES
    method: str
    model: str
    rows: str  # a .jsonl file: prompt, chosen and rejected, or for KTO prompt, completion and label
    passes: int
    steps: int  # steps per pass
    batch: int  # pairs per step
    max_length: int
    checkpointing: bool  # gradient checkpointing of all layers
    counted: bool = False  # count storages instead of measuring time
    profiled: bool = False  # find where the time goes, which takes time itself

    @property
    def rows_a_step(self) -> int:
        return self.batch * (2 if self.method == "kto" else 1)


def held_bytes() -> int:
    """Return the bytes held now: allocated on the GPU, or resident on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def joules() -> float | None:
    """Return the joules that an NVIDIA card (Volta or newer) has used since its driver was loaded, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0)) / 1000
    except Exception:  # without the package or the reading, each driver fails in its own way
        return None


def used(before: float | None) -> float | None:
    after = joules()
    return None if before is None or after is None else after - before


def run_fastpref(job: Job) -> dict[str, Any]:
    import fastpref
    from fastpref.memory.allocations import PeakStorage
    from fastpref.training import loop, start

    loaded: dict[str, Any] = {}
    memory = PeakStorage() if job.counted else None
    profile = shares() if job.profiled else nullcontext(Shares())
    load_model = start.load_model

    def load_and_measure(*args: Any, **options: Any) -> Any:
        model = load_model(*args, **options)
        loaded["bytes"], loaded["joules"] = held_bytes(), joules()
        if memory is not None:
            memory.__enter__()
        loaded["shares"] = profile.__enter__()
        return model

    start.load_model = load_and_measure
    # The terms are the same as TRL's.
    same_terms = {"orpo": 'nll_on = "all"\n', "simpo": "beta = 0.1\ngamma = 0.5\n"}.get(job.method, "")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.toml"
        config.write_text(
            f"[model]\nname = {json.dumps(job.model)}\n[lora]\nrank = 16\nalpha = 32\n"
            f'[loss]\ntype = "{job.method}"\n{same_terms}[[data]]\npath = {json.dumps(job.rows)}\n'
            f"[tokens]\nmax_length = {job.max_length}\n[output]\ndir = {json.dumps(folder + '/run')}\n"
            f"[train]\nsteps = {job.passes * job.steps}\nbatch = {job.rows_a_step}\nwarmup = 0\n"
            f"learning_rate = {LEARNING_RATE}\ncheckpointing = {'true' if job.checkpointing else 'false'}\n"
        )
        with patch.object(loop, "time", SimpleNamespace(**vars(time) | {"perf_counter": now})):
            fastpref.train(config, cache=False)  # a cached reference would save its pass
        profile.__exit__(None, None, None)
        if memory is not None:
            memory.__exit__(None, None, None)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = [job.rows_a_step / row["pairs_per_second"] for row in rows if "pairs_per_second" in row]
    losses = [row["loss"] for row in rows]
    return {
        "seconds": seconds,
        "loss": losses,
        "peak": peak_bytes() - loaded["bytes"] if memory is None else memory.peak,
        "joules": used(loaded["joules"]),
        "shares": asdict(loaded["shares"]),
    }


def run_trl(job: Job) -> dict[str, Any]:
    if job.engine == "trl-patched":
        import trl

        import fastpref

        fastpref.patch(trl)
    from fastpref.memory.allocations import PeakStorage

    model = trl_model(job)
    before = held_bytes()
    clock, times = step_clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(job, model, folder, callbacks=[clock])
        energy = joules()
        profile = shares() if job.profiled else nullcontext(Shares())
        with PeakStorage() if job.counted else nullcontext() as memory, profile as parts:
            trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    peak = peak_bytes() - before if memory is None else memory.peak
    return {"seconds": times, "loss": losses, "peak": peak, "joules": used(energy), "shares": asdict(parts)}


def step_clock() -> tuple[Any, list[float]]:
    """Return a callback of TRL's trainer, and the seconds of each step, which it fills in."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += now()

    return Clock(), times


def now() -> float:
    """Return the seconds of a clock: with a GPU on the wall, once it has done all that was asked of it.

    On a CPU it is the time of the process, which other load disturbs less.
    """
    import torch

    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def trl_model(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"dtype": torch.bfloat16 if gpu else torch.float32}
    if gpu:  # where its weights are held before the peak of training is measured, as fastpref's are
        options["device_map"] = {"": 0}
    return AutoModelForCausalLM.from_pretrained(job.model, **options)


def trl_trainer(job: Job, model: Any, folder: str, **options: Any) -> Any:
    """Return TRL's trainer of a job, with LoRA on all linear layers. `folder` is its output_dir."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    make_settings, make_trainer, settings = _trl_classes(job.method)
    gpu = torch.cuda.is_available()
    if job.engine == "trl-liger":
        settings |= {"use_liger_kernel": True}
    arguments = make_settings(
        output_dir=folder,
        per_device_train_batch_size=job.rows_a_step,
        max_steps=job.passes * job.steps,
        max_length=job.max_length,
        learning_rate=LEARNING_RATE,
        gradient_checkpointing=job.checkpointing,
        bf16=gpu,
        use_cpu=not gpu,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **settings,
    )
    return make_trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_json(job.rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        **options,
    )


def _trl_classes(method: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return the classes of the settings and of the trainer, and the settings that select the method."""
    if method in ("dpo", "ipo"):
        from trl import DPOConfig, DPOTrainer

        return DPOConfig, DPOTrainer, {"loss_type": "ipo"} if method == "ipo" else {}
    if method == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOConfig, KTOTrainer, {}
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOConfig, ORPOTrainer, {}
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOConfig, CPOTrainer, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}


if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps(run_fastpref(job) if job.engine == "fastpref" else run_trl(job)))
