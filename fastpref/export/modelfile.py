"""The Modelfile with which Ollama makes a model of a GGUF file."""

from collections.abc import Sequence

from fastpref.export.place import MARK

_CONTEXT = 8192  # tokens, if the model has more: Ollama reserves memory for all of them


def modelfile(file: str, template: str | None, ends: Sequence[str], context: int, licence: str | None) -> str:
    """Return the text of a Modelfile for a file beside it. `template` is in Go's language."""
    lines = [f"# Written by `{MARK}`: ollama create NAME -f Modelfile", f"FROM ./{file}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines += [
            "# The chat template is not one of plain turns, so none is written here: Ollama sends the text of a",
            "# prompt as it is. llama-server --jinja uses the chat template in the file.",
        ]
    # Ollama takes the text between the quotes as it is. The ends are in the file too, as tokens.
    lines += [f'PARAMETER stop "{end}"' for end in ends if not set(end) & set('"\\\n')]
    lines.append(f"PARAMETER num_ctx {min(context, _CONTEXT)}")
    if licence is not None and '"""' not in licence:
        lines.append(f'LICENSE """{licence.rstrip()}"""')
    return "\n".join(lines) + "\n"
