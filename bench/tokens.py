"""Rows a second from a file of chat pairs to token ids: plain `datasets.map` with the tokenizer, and fastpref.

    python bench/tokens.py                          # 100,000 synthetic chats, a small tokenizer trained on them
    python bench/tokens.py --model FOLDER --data pairs.jsonl

Both start at the file and end with Arrow. The plain one loads the file with `datasets`, renders prompt,
prompt + chosen and prompt + rejected with the chat template and gives each batch of 1,000 rows to the fast tokenizer in
one call; it finds no mistakes, no prompt's end and no end tokens. Every run is a process of its own, in turn. On a busy
machine the ratio of CPU time says more than that of rows a second. Memory is how far its peak grew over the start of
the work; pages of mapped files count as resident, though the system takes them back when it needs them.
"""

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# --- Rows and a tokenizer -----------------------------------------------------------------------------------------


def write_rows(path: Path, count: int) -> None:
    """Write chats of made-up words: prompts of about 90 words in one or three turns, answers of about 60."""
    rng = random.Random(0)
    letters = "etaoinshrdlcumwfgypbvk"
    words = ["".join(rng.choices(letters, range(22, 0, -1), k=rng.randint(2, 9))) for _ in range(5000)]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high))).capitalize() + "."

    with path.open("w") as file:
        for at in range(count):
            prompt = [{"role": "user", "content": text(20, 100)}]
            if at % 2:
                prompt += [{"role": "assistant", "content": text(10, 50)}, {"role": "user", "content": text(5, 50)}]
            answers = {name: [{"role": "assistant", "content": text(20, 100)}] for name in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": prompt} | answers) + "\n")


def write_tokenizer(folder: Path, data: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner: Any = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    with data.open() as file:
        lines = [next(file, "") for _ in range(2000)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=8000, show_progress=False, initial_alphabet=alphabet)
    )
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


# --- The two -------------------------------------------------------------------------------------------------------


def run_map(model: str, data: str, folder: str) -> dict[str, float]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def render(messages: list[Any], generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = []
        for prompt, chosen, rejected in zip(batch["prompt"], batch["chosen"], batch["rejected"]):
            texts += [render(prompt, True), render(prompt + chosen), render(prompt + rejected)]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return {"prompt_ids": ids[::3], "chosen_ids": ids[1::3], "rejected_ids": ids[2::3]}

    def work() -> int:
        table: Any = datasets.load_dataset("json", data_files=data, split="train", cache_dir=folder)
        return len(table.map(tokenize, batched=True, batch_size=1000, remove_columns=table.column_names))

    return _measure(work)


def run_fastpref(model: str, data: str, folder: str, *, cached: bool = True) -> dict[str, float]:
    os.environ["FASTPREF_CACHE"] = folder
    from fastpref.config import load_config
    from fastpref.data.cache import load_examples
    from fastpref.model.tokenizer import load_tokenizer

    path = Path(folder) / "run.toml"
    path.write_text(f"[model]\nname = {json.dumps(model)}\n[[data]]\npath = {json.dumps(data)}\n")
    config = load_config(path)
    tokenizer = load_tokenizer(config.model)
    return _measure(lambda: len(load_examples(config, tokenizer, cache=cached).train))


ENGINES = {
    "map": run_map, "fastpref": run_fastpref, "fastpref --no-cache": partial(run_fastpref, cached=False)
}  # fmt: skip


def _measure(work: Callable[[], int]) -> dict[str, float]:
    """Return rows, seconds, and the growth of peak memory in MiB, resident and without the pages of mapped files."""
    before, anonymous = _resident_peak(), _anonymous()
    began, computed = time.perf_counter(), time.process_time()
    highest, finished = anonymous, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not finished.wait(0.05):
            highest = max(highest, _anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    rows = work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - computed
    finished.set()
    watcher.join()
    memory = {"resident": _resident_peak() - before, "anonymous": highest - anonymous}
    return {"rows": rows, "seconds": seconds, "cpu": cpu} | memory


def _resident_peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _anonymous() -> float:
    """Return the resident memory in MiB that is not of a mapped file, or 0 if the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


# --- The comparison ------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="A model's folder; a small tokenizer is trained if left out.")] = "",
    data: Annotated[str, typer.Option(help="A .jsonl file of prompt, chosen and rejected messages.")] = "",
    rows: Annotated[int, typer.Option(help="How many to make, without --data.")] = 100_000,
    repeats: int = 3,
    engine: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print rows a second and the ratio to plain `datasets.map`."""
    if engine:
        print(json.dumps(ENGINES[engine](model, data, folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        if not data:
            data = str(Path(temporary) / "pairs.jsonl")
            write_rows(Path(data), rows)
        if not model:
            model = str(Path(temporary) / "model")
            write_tokenizer(Path(model), Path(data))
        results: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
        for _ in range(repeats):
            for name in ENGINES:
                results[name].append(_one(name, model, data, temporary))
        size = Path(data).stat().st_size / 2**20
    console = Console()
    console.print(f"{results['map'][0]['rows']:.0f} rows, {size:.0f} MiB; {os.cpu_count()} cores")
    table = Table("", "rows/s", "ratio", "ratio, CPU time", "memory +MiB", "of it no file's")
    plain, plain_cpu = _median(results["map"], "seconds"), _median(results["map"], "cpu")
    for name, runs in results.items():
        seconds = _median(runs, "seconds")
        table.add_row(
            name,
            f"{runs[0]['rows'] / seconds:,.0f}",
            f"{plain / seconds:.2f}",
            f"{plain_cpu / _median(runs, 'cpu'):.2f}",
            f"{_median(runs, 'resident'):.0f}",
            f"{_median(runs, 'anonymous'):.0f}",
        )
    console.print(table)


def _one(engine: str, model: str, data: str, temporary: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=temporary) as folder:
        arguments = ["--engine", engine, "--model", model, "--data", data, "--folder", folder]
        environment = os.environ | {"HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        process = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment
        )
    if process.returncode:
        raise RuntimeError(f"{engine} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def _median(runs: list[dict[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


if __name__ == "__main__":
    app()
