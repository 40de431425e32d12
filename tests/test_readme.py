"""Every command of README.md, CONTRIBUTING.md and three pages of docs/ runs as written, on a tiny model."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from tests.support.command_line import succeed
from tests.support.paths import QUICKSTART_MODEL
from tests.support.readme import COMMANDS, OURS
from tests.support.runs import CONFIG

STANDING_FOR = {"NAME": "model", "PATH": "pairs.jsonl"}  # as the README writes them
ELSEWHERE = {  # run by other tests, or needed to make this environment
    "pip install .": "tests/test_package.py",
    "fastpref train examples/quickstart.toml": "tests/training/test_loop.py",
    'pip install -c constraints.txt -e ".[dev]" && pytest -n logical': ".ci/run",
    'pip install "fastpref[export]"': "pyproject.toml",
    "python -m bench.compile_report docs/kernels.md": "tests/kernels/test_compile.py",
    "python -m bench first-card": "tests/bench/test_first_card.py",
    "python -m bench.trainer_memory": "tests/bench/test_trainer_memory.py",
    "python -m bench.allocator FOLDER": "tests/memory/test_caching_allocator.py",
    "python -m tests.support.counts": "tests/memory/test_estimate.py",
    "fastpref preview examples/quickstart.toml --rows 1": "tests/preview/test_preview.py",
}


@pytest.fixture
def folder(tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a reader's folder (my.toml, its finished run, a model, data), and a hub that accepts everything."""
    monkeypatch.chdir(tmp_path)
    model = QUICKSTART_MODEL.as_posix()
    Path("my.toml").write_text(CONFIG.replace('[output]\ndir = "out"\n', "[output]\n") + "[lora]\nrank = 4\n")
    Path("cfg.yml").write_text(f"{{base_model: {model}, rl: dpo, learning_rate: 1e-4, datasets: [{{path: d}}]}}")
    Path("pairs.jsonl").write_text('{"prompt": "q", "chosen": "yes", "rejected": "no"}\n')
    shutil.copytree(finished_run, "runs/my-dpo")
    shutil.copytree(finished_run, "runs/my-kto")  # for the comparison of two runs
    checkpoints = Path("runs/my-dpo/checkpoints")
    shutil.copytree(checkpoints / "step-4", checkpoints / "step-100")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, answer in {"whoami": {}, "create_repo": "https://hub/me/my-model", "upload_folder": None}.items():
        monkeypatch.setattr(HfApi, name, lambda *_, answer=answer, **__: answer)
    return tmp_path


@pytest.mark.parametrize("line", OURS)
def test_a_command_runs(line: str, folder: Path):
    """A command ends with status 0. A run is resumed for as many steps as its config says."""
    words = [STANDING_FOR.get(word, word) for word in shlex.split(line)]
    if words[1] == "train" and "--resume" in words:
        stopped_run()
    elif words[1] == "train":
        words = [word if not word.startswith("train.steps=") else "train.steps=2" for word in words]
    succeed(*words[1:], given=(folder / "cfg.yml").read_text(encoding="utf-8"))


def stopped_run() -> None:
    """Write the run's own config, with more steps than the run has done."""
    config = Path("runs/my-dpo/config.toml").read_text(encoding="utf-8")
    Path("my.toml").write_text(re.sub(r"(?m)^dir = .*\n", "", config).replace("steps = 4", "steps = 5"))
    shutil.rmtree("runs/my-dpo/final")


def test_every_command_is_run_somewhere():
    """Every other command has another test; those for several devices are in tests/test_processes.py."""
    others = [line for line in COMMANDS if line not in OURS and not line.startswith("accelerate launch ")]
    assert set(others) <= set(ELSEWHERE)
