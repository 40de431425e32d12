"""Pairs a second and peak memory of whole training steps: fastpref beside TRL, on the same rows.

    python bench/trainers.py compare MODEL_FOLDER PAIRS_FILE --method dpo --method orpo

Takes the first rows that fit in --max-length without a cut, and trains each engine on them in a process of its own,
one after the other: LoRA on all linear layers, batches of --batch pairs, float32 on a CPU and bfloat16 on a GPU.
Speed is the median over the steps but the first. Memory is the peak over what was held once the model was loaded:
resident memory on a CPU, allocated memory on a GPU.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Job:
    engine: str  # fastpref or trl
    method: str
    model: str
    rows: str  # a .jsonl file of prompt, chosen and rejected messages
    steps: int
    batch: int
    max_length: int
    checkpointing: bool


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


def run_fastpref(job: Job) -> dict[str, Any]:
    import fastpref
    from fastpref.train import loop

    loaded: dict[str, int] = {}
    load_model = loop.load_model

    def load_and_measure(*args: Any, **options: Any) -> Any:
        made = load_model(*args, **options)
        loaded["bytes"] = held_bytes()
        return made

    loop.load_model = load_and_measure
    same_terms = 'nll_on = "all"\n' if job.method == "orpo" else ""  # as TRL's
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.toml"
        config.write_text(
            f"[model]\nname = {json.dumps(job.model)}\n[lora]\nrank = 16\nalpha = 32\n"
            f'[loss]\ntype = "{job.method}"\n{same_terms}[[data]]\npath = {json.dumps(job.rows)}\n'
            f"[tokens]\nmax_length = {job.max_length}\n[output]\ndir = {json.dumps(folder + '/run')}\n"
            f"[train]\nsteps = {job.steps}\nbatch = {job.batch}\nlearning_rate = 1e-4\nwarmup = 0\n"
            f"checkpointing = {'true' if job.checkpointing else 'false'}\n"
        )
        fastpref.train(config)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["pairs_per_second"] for row in rows if "pairs_per_second" in row]
    return {"pairs_per_second": speeds, "loss": [row["loss"] for row in rows], "peak": peak_bytes() - loaded["bytes"]}


def run_trl(job: Job) -> dict[str, Any]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

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
        options: dict[str, Any] = {"loss_type": "simpo", "cpo_alpha": 0.0} if job.method == "simpo" else {}
        make_settings, make_trainer = _trl_classes(job.method)
        settings = make_settings(
            output_dir=folder,
            per_device_train_batch_size=job.batch,
            max_steps=job.steps,
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
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"pairs_per_second": [job.batch / t for t in times], "loss": losses, "peak": peak_bytes() - before}


def _trl_classes(method: str) -> tuple[Any, Any]:
    if method == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOConfig, DPOTrainer
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOConfig, ORPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOConfig, CPOTrainer


def choose_rows(model: str, file: Path, count: int, max_length: int, target: Path) -> None:
    """The first `count` pairs that fit without a cut, as prompt, chosen and rejected messages."""
    import datasets
    from transformers import AutoTokenizer

    from fastpref.data.formats import Paired, detect

    tokenizer = AutoTokenizer.from_pretrained(model)
    table = datasets.load_dataset("json", data_files=str(file), split="train")
    form = detect(table[0])
    if form is None:
        raise typer.BadParameter(f"{file}: not a file of pairs")
    chosen = []
    for raw in table:
        pair = form.read(raw)  # pyright: ignore[reportArgumentType]
        if not isinstance(pair, Paired) or isinstance(pair.prompt, str):
            raise typer.BadParameter(f"{file}: chats with chosen and rejected are needed")
        lengths = [
            len(tokenizer(str(tokenizer.apply_chat_template([*pair.prompt, *side], tokenize=False))).input_ids)  # pyright: ignore[reportGeneralTypeIssues]
            for side in (pair.chosen, pair.rejected)
        ]
        if max(lengths) <= max_length:
            chosen.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected})
        if len(chosen) == count:
            break
    target.write_text("".join(json.dumps(row) + "\n" for row in chosen))


def run_apart(job: Job) -> dict[str, Any]:
    """Run a job in a process of its own, so that peaks do not mix."""
    done = subprocess.run(
        [sys.executable, __file__, "one", json.dumps(job.__dict__)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{job.engine} {job.method} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


app = typer.Typer(add_completion=False)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="A model's folder.")],
    pairs: Annotated[Path, typer.Argument(help="A .json or .jsonl file of pairs.")],
    method: Annotated[list[str] | None, typer.Option(help="dpo, orpo or simpo; may be repeated.")] = None,
    rows: int = 8,
    batch: int = 2,
    max_length: int = 768,
    checkpointing: bool = False,
) -> None:
    """Compare the engines and print a table."""
    table = Table(title=f"{rows} pairs of at most {max_length} tokens, {batch} a step, LoRA rank 16, {_machine()}")
    for column in ("method", "engine", "pairs/s", "ratio", "peak over the loaded model", "ratio", "first loss"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        choose_rows(model, pairs, rows, max_length, file)
        for name in method or ["dpo", "orpo"]:
            job = Job(
                "trl", name, str(Path(model).resolve()), str(file), rows // batch, batch, max_length, checkpointing
            )
            theirs = run_apart(job)
            ours = run_apart(Job(**{**job.__dict__, "engine": "fastpref"}))
            base = statistics.median(theirs["pairs_per_second"][1:])
            for engine, found in (("TRL", theirs), ("fastpref", ours)):
                speed = statistics.median(found["pairs_per_second"][1:])
                table.add_row(
                    name,
                    engine,
                    f"{speed:.3f}",
                    f"{speed / base:.2f}",
                    f"{found['peak'] / 1e9:.2f} GB",
                    f"{found['peak'] / theirs['peak']:.2f}",
                    f"{found['loss'][0]:.4f}",
                )
    Console().print(table)


@app.command()
def one(job: str) -> None:
    """One job of `compare`: prints its result as JSON."""
    made = Job(**json.loads(job))
    print(json.dumps(run_fastpref(made) if made.engine == "fastpref" else run_trl(made)))


def _machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    app()
