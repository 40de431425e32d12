"""Pairs a second and peak memory of whole training steps: fastpref beside TRL, on the same rows.

    python -m bench.trainers MODEL_FOLDER PAIRS_FILE --method dpo --method orpo

Takes the first rows that fit in --max-length without a cut, and trains each engine on them in a process of its own,
one after the other: LoRA on all linear layers, batches of --batch pairs, float32 on a CPU and bfloat16 on a GPU. KTO
gets both responses of every pair as rows of their own, two for a pair in each batch.
Speed is that of one pass over the rows, so that every engine has the same work, whatever its order; on a GPU a pass
before it warms up. Memory is the peak over what was held once the model was loaded: resident memory on a CPU, allocated
memory on a GPU. The small random models of `python -m bench` take less than libraries do: there, on a CPU, it is the
peak of all tensor storages that are made once the model is loaded, in a further run that counts and is not timed.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.step_data import StepShape, make_rows, write_model, write_rows

ENGINES = {"trl": "TRL", "trl-patched": "TRL, patched", "trl-liger": "TRL with Liger", "fastpref": "fastpref"}


@dataclass(frozen=True)
class Job:
    engine: str  # of ENGINES
    method: str
    model: str
    rows: str  # a .jsonl file of messages: prompt, chosen and rejected, or for KTO prompt, completion and label
    passes: int
    steps: int  # of one pass
    batch: int  # pairs a step
    max_length: int
    checkpointing: bool
    counted: bool = False  # count storages instead of taking times

    @property
    def rows_a_step(self) -> int:
        return self.batch * (2 if self.method == "kto" else 1)


def held_bytes() -> int:
    """What is held now: allocated on the GPU, or resident on a CPU."""
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
    """What an NVIDIA card has used since its driver was loaded, if it tells (from Volta on)."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0)) / 1000
    except Exception:  # no such package, no such reading: each driver fails in its own way
        return None


def used(before: float | None) -> float | None:
    after = joules()
    return None if before is None or after is None else after - before


def run_fastpref(job: Job) -> dict[str, Any]:
    import fastpref
    from fastpref.memory.allocations import PeakStorage
    from fastpref.training import start

    loaded: dict[str, Any] = {}
    memory = PeakStorage() if job.counted else None
    load_model = start.load_model

    def load_and_measure(*args: Any, **options: Any) -> Any:
        made = load_model(*args, **options)
        loaded["bytes"], loaded["joules"] = held_bytes(), joules()
        if memory is not None:
            memory.__enter__()
        return made

    start.load_model = load_and_measure
    # As TRL's.
    same_terms = {"orpo": 'nll_on = "all"\n', "simpo": "beta = 0.1\ngamma = 0.5\n"}.get(job.method, "")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.toml"
        config.write_text(
            f"[model]\nname = {json.dumps(job.model)}\n[lora]\nrank = 16\nalpha = 32\n"
            f'[loss]\ntype = "{job.method}"\n{same_terms}[[data]]\npath = {json.dumps(job.rows)}\n'
            f"[tokens]\nmax_length = {job.max_length}\n[output]\ndir = {json.dumps(folder + '/run')}\n"
            f"[train]\nsteps = {job.passes * job.steps}\nbatch = {job.rows_a_step}\nlearning_rate = 1e-4\nwarmup = 0\n"
            f"checkpointing = {'true' if job.checkpointing else 'false'}\n"
        )
        fastpref.train(config)
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
    }


def run_trl(job: Job) -> dict[str, Any]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch

    if job.engine == "trl-patched":
        import trl

        from fastpref.patch import patch

        patch(trl)
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from fastpref.memory.allocations import PeakStorage

    make_settings, make_trainer, options = _trl_classes(job.method)
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)
    before = held_bytes()
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        if job.engine == "trl-liger":
            options |= {"use_liger_kernel": True}
        settings = make_settings(
            output_dir=folder,
            per_device_train_batch_size=job.rows_a_step,
            max_steps=job.passes * job.steps,
            max_length=job.max_length,
            learning_rate=1e-4,
            gradient_checkpointing=job.checkpointing,
            bf16=gpu,
            use_cpu=not gpu,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            **options,
        )
        trainer = make_trainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_json(job.rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        energy = joules()
        with PeakStorage() if job.counted else nullcontext() as memory:
            trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    peak = peak_bytes() - before if memory is None else memory.peak
    return {"seconds": times, "loss": losses, "peak": peak, "joules": used(energy)}


def _trl_classes(method: str) -> tuple[Any, Any, dict[str, Any]]:
    """The settings' class, the trainer's, and what makes it the method."""
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


def choose_rows(model: str, file: Path, count: int, max_length: int, prompts: str = "all") -> list[dict[str, Any]]:
    """The first `count` pairs that fit without a cut, as prompt, chosen and rejected messages.

    `prompts`: of the pairs that fit, only the half whose prompt is the larger share of their tokens ("heavy"), or the
    smaller ("light").
    """
    import datasets
    from transformers import AutoTokenizer

    from fastpref.data.rows.formats import Paired, detect

    if prompts not in ("all", "heavy", "light"):
        raise typer.BadParameter(f"--prompts {prompts}: known are all, heavy and light")
    tokenizer = AutoTokenizer.from_pretrained(model)
    table = datasets.load_dataset("json", data_files=str(file), split="train")
    form = detect(table[0])
    if form is None:
        raise typer.BadParameter(f"{file}: not a file of pairs")

    def tokens(messages: Any) -> int:
        return len(tokenizer(str(tokenizer.apply_chat_template([*messages], tokenize=False))).input_ids)

    fitting: list[tuple[float, dict[str, Any]]] = []
    for raw in table:
        pair = form.read(raw)  # pyright: ignore[reportArgumentType]
        if not isinstance(pair, Paired) or isinstance(pair.prompt, str):
            raise typer.BadParameter(f"{file}: chats with chosen and rejected are needed")
        lengths = [tokens([*pair.prompt, *side]) for side in (pair.chosen, pair.rejected)]
        if max(lengths) <= max_length:
            share = 2 * tokens(pair.prompt) / sum(lengths)
            fitting.append((share, {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}))
        if prompts == "all" and len(fitting) == count:
            break
    if prompts != "all":
        middle = statistics.median(share for share, _ in fitting)
        fitting = [(share, row) for share, row in fitting if (share >= middle) == (prompts == "heavy")]
    if len(fitting) < count:
        raise typer.BadParameter(f"{file}: only {len(fitting)} pairs fit in {max_length} tokens, {count} are wanted")
    return [row for _, row in fitting[:count]]


def split_pairs(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pair as two rows of KTO's."""
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]


class EngineFailed(Exception):
    """The end of what a job's process said."""


def run_apart(job: Job) -> dict[str, Any]:
    """Run a job in a process of its own, so that peaks do not mix."""
    command = [sys.executable, "-m", "bench.trainers", "--job", json.dumps(job.__dict__)]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        raise EngineFailed(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def engines_for(method: str) -> list[str]:
    """TRL's Liger path needs a GPU, and knows DPO and KTO."""
    import torch

    liger = torch.cuda.is_available() and method in ("dpo", "kto")
    return [engine for engine in ENGINES if liger or engine != "trl-liger"]


def compare(
    model: Path, pairs: list[dict[str, Any]], method: str, batch: int, max_length: int, *, checkpointing: bool = False,
    tokens_a_pair: float = 0.0, counted: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """What each engine took, in turn; TRL is the first. One that fails has a note instead of numbers."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(split_pairs(pairs) if method == "kto" else pairs, file)
        job = Job(
            engine="trl",
            method=method,
            model=str(model.resolve()),
            rows=str(file),
            passes=2 if torch.cuda.is_available() else 1,
            steps=len(pairs) // batch,
            batch=batch,
            max_length=max_length,
            checkpointing=checkpointing,
        )
        results = []
        for engine in engines_for(method):
            try:
                found = run_apart(replace(job, engine=engine))
                if counted:
                    found["peak"] = run_apart(replace(job, engine=engine, counted=True))["peak"]
            except EngineFailed as error:
                if engine in ("trl", "fastpref"):
                    raise
                results.append({"engine": engine, "note": f"failed: {str(error).strip().splitlines()[-1][:120]}"})
                continue
            speed = job.steps * batch / sum(found["seconds"][-job.steps :])
            results.append(
                {
                    "engine": engine,
                    "pairs_per_second": speed,
                    "tokens_per_second": speed * tokens_a_pair,
                    "peak": found["peak"],
                    "loss": found["loss"][0],
                    "joules_a_pair": found["joules"] / (job.passes * job.steps * batch) if found["joules"] else None,
                }
            )
    return results


def compare_shape(shape: StepShape, method: str) -> dict[str, Any]:
    """The engines on a random model and random rows of given sizes."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(shape, model)
        pairs = make_rows(shape)
        tokens = count_tokens(str(model), pairs)
        found = compare(
            model, pairs, method, shape.batch, 2 * shape.length,
            tokens_a_pair=tokens / len(pairs), counted=not torch.cuda.is_available(),
        )  # fmt: skip
    return {"what": shape.what, "method": method, "engines": found}


def count_tokens(model: str, pairs: list[dict[str, Any]]) -> int:
    """Tokens of prompt with response, of both responses, without padding: what a step is given, whoever takes it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.apply_chat_template([*p["prompt"], *p[side]], tokenize=False)
             for p in pairs for side in ("chosen", "rejected")]  # fmt: skip
    return sum(len(ids) for ids in tokenizer([str(text) for text in texts]).input_ids)


def main(
    model: Annotated[str, typer.Argument(help="A model's folder.")] = "",
    pairs: Annotated[Path | None, typer.Argument(help="A .json or .jsonl file of pairs.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="dpo, ipo, kto, orpo or simpo; may be repeated.")] = None,
    rows: int = 8,
    batch: int = 2,
    max_length: int = 768,
    checkpointing: bool = False,
    prompts: Annotated[str, typer.Option(help="all rows; or the half of them with the larger or smaller share of "
                                              "prompt: all, heavy or light.")] = "all",
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:  # fmt: skip
    """Compare the engines on a model and pairs of yours, and print a table."""
    if job:
        made = Job(**json.loads(job))
        print(json.dumps(run_fastpref(made) if made.engine == "fastpref" else run_trl(made)))
        return
    if not model or pairs is None:
        raise typer.BadParameter("give a model's folder and a file of pairs")
    import torch

    from bench.machine import describe

    machine = describe("cuda" if torch.cuda.is_available() else "cpu")
    name = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    chosen = choose_rows(model, pairs, rows, max_length, prompts)
    tokens = count_tokens(model, chosen) / len(chosen)
    table = Table(
        title=f"{rows} pairs of at most {max_length} tokens, prompts: {prompts}, {batch} a step, LoRA rank 16, {name}, "
        f"{machine['threads']} threads, TRL {machine['versions'].get('trl')}"
    )
    for column in ("method", "engine", "pairs/s", "× TRL", "tokens/s", "peak over the model", "× TRL", "first loss"):
        table.add_column(column, justify="right")
    for one in method or ["dpo", "orpo"]:
        results = compare(
            Path(model), chosen, one, batch, max_length, checkpointing=checkpointing, tokens_a_pair=tokens
        )
        base = results[0]
        for found in results:
            if "note" in found:
                table.add_row(one, ENGINES[found["engine"]], found["note"])
                continue
            table.add_row(
                one,
                ENGINES[found["engine"]],
                f"{found['pairs_per_second']:.3f}",
                f"{found['pairs_per_second'] / base['pairs_per_second']:.2f}",
                f"{found['tokens_per_second']:.0f}",
                f"{found['peak'] / 1e9:.2f} GB",
                f"{found['peak'] / base['peak']:.2f}",
                f"{found['loss']:.4f}",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
