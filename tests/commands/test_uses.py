"""`merge` and `export` print the commands that use what they wrote, and these run as they stand."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from fastpref.export.uses import of_adapter, of_model
from tests.support.command_line import succeed
from tests.support.paths import DOCS


def printed(out: str) -> list[list[str]]:
    """Return the words of the commands that are named as the next ones."""
    return [shlex.split(line.removeprefix("next: ")) for line in out.splitlines() if line.startswith("next: ")]


def test_the_next_commands_run(finished_run: Path, elsewhere: Path):
    """Ours end with status 0, and those of other programs name files that are there. A space in a name is quoted."""
    merged = printed(succeed("merge", finished_run, "--output", "my model", "--dtype", "float32").out)
    assert [words[:2] for words in merged] == [["fastpref", "chat"], ["vllm", "serve"], ["fastpref", "export"]]
    exported = printed(succeed(*merged[2][1:]).out)
    adapter = printed(succeed("export", finished_run, "--gguf", "--adapter").out)
    succeed(*merged[0][1:], "--max-tokens", "2", given="hello\n")
    succeed(*adapter[0][1:])
    assert Path(merged[1][2]).is_dir()
    (llama, ollama), (_, with_adapter) = exported, adapter
    files = [llama[llama.index("-m") + 1], ollama[ollama.index("-f") + 1], with_adapter[2], with_adapter[4]]
    assert [name for name in files if not Path(name).is_file()] == []
    card = (Path(files[0]).parent / "README.md").read_text(encoding="utf-8")
    assert f"```\nllama-cli -m {shlex.quote(Path(files[0]).name)}\nollama create " in card


def test_the_code_for_transformers_runs(
    finished_run: Path, whole_run: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
):
    """The code on docs/use.md prints an answer of an adapter, and what it says of a whole model is true."""
    Path("runs").mkdir()
    Path("runs/my-dpo").symlink_to(finished_run)
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "use.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "docs/use.md", "exec"), {})
    answer = capsys.readouterr().out.strip()
    assert answer
    assert "<|" not in answer
    ends = GenerationConfig.from_pretrained(whole_run / "final").eos_token_id
    assert AutoModelForCausalLM.from_pretrained(whole_run / "final").generation_config.eos_token_id == ends


@pytest.mark.parametrize(
    ("name", "tag"), [("My-Run", "my-run"), ("a b/ü", "a-b"), ("--x", "x"), ("..", "model"), ("v1.2_q", "v1.2_q")]
)
def test_names_are_those_that_ollama_takes(name: str, tag: str):
    """Ollama's names have small letters, digits and -_. only."""
    assert f"ollama create {tag} -f out/Modelfile && ollama run {tag}" in of_model(
        Path("out/x.gguf"), name, ollama=True
    )


def test_without_plain_turns_the_template_in_the_file_is_used():
    """A Modelfile without a template would send bare text, so Ollama is not named. A base may be unknown."""
    commands = of_model(Path("x.gguf"), "x", ollama=False)
    assert all("--jinja" in line for line in commands)
    assert of_adapter(Path("x.gguf"), None)[0].startswith("fastpref export BASE ")
