"""Chat templates given by a known name, as Jinja, or as a file."""

from pathlib import Path

from fastpref.errors import UserError

_TEXT_ONLY = (
    "{% if tools %}{{ raise_exception('this template cannot write tools') }}{% endif %}"
    "{% for m in messages %}{% if m['tool_calls'] %}{{ raise_exception('this template cannot write tool calls') }}"
    "{% endif %}{% endfor %}"
)
KNOWN = {
    "chatml": _TEXT_ONLY
    + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": _TEXT_ONLY
    + "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": _TEXT_ONLY + "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi_3": _TEXT_ONLY
    + "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "zephyr": _TEXT_ONLY
    + "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}
OWN = "tokenizer_default"


def load_chat_template(given: str | None, key: str) -> str | None:
    """Return the chat template for a known name, Jinja text, or a file; None for None and "tokenizer_default".

    Raises UserError, naming `key`, for a file that cannot be read.
    """
    if given is None or given == OWN:
        return None
    if given in KNOWN:
        return KNOWN[given]
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        names = "" if "." in given or "/" in given else f"; known names are {', '.join((OWN, *KNOWN))}"
        raise UserError(f"{key}: {given}: cannot be read: {error}{names}") from None
