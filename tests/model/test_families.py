"""Every family of causal language models gives the right numbers, says why it is slower, or is refused by name.

A few families, each with a different difficulty, are always tried; all others are slow tests.
"""

from pathlib import Path

import pytest
import transformers

from tests.model.sweep import PAGE, look, page_rows, page_version
from tests.support.families import FAMILIES

_CHOSEN = {  # the expected layout of each
    "bert+encoder": "refused",  # attends to later tokens
    "bloom": "padded",  # its own attention takes no other mask
    "dbrx": "tree",  # its number of experts is stored elsewhere
    "deepseek_v4": "padded",  # its own mask, and routers in some layers only
    "falcon_h1": "padded",  # state-space branches next to attention
    "gpt_neo": "padded",  # selects attention classes by name
    "gpt_oss": "tree",  # sinks, also with a cache
    "granitemoehybrid+dense": "tree",  # routers without experts
    "hyperclovax": "tree",  # its own logits
    "inkling2_text": "padded",  # RoPE depends on the length of a call
    "llama+dynamic": "tree",  # needs attention that trees do not compute
    "llama4_text": "padded",  # attention chunks by position in the row
    "phimoe+longrope": "refused",  # RoPE depends on the length of a call, in the model's own code
    "stablelm": "padded",  # layers that do not pass keyword arguments on
}


def _try(name: str, folder: Path) -> str:
    family = look(name, folder)
    assert family.faults == []
    assert (family.layout == "tree") == (not family.why)
    return family.layout


@pytest.mark.parametrize("name", sorted(_CHOSEN.keys() & set(FAMILIES)))  # an older transformers has fewer
def test_faults_of_each_kind(tmp_path: Path, name: str):
    """Every layout is right to 2e-5, or the model is refused; training, copies and generation are checked too."""
    assert _try(name, tmp_path) == _CHOSEN[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - _CHOSEN.keys()))
def test_every_family(tmp_path: Path, name: str):
    """Every other family of the installed transformers passes the same checks, with the layout in docs/models.md."""
    text = PAGE.read_text()
    layout = _try(name, tmp_path)
    if page_version(text) == transformers.__version__:
        assert layout == page_rows(text)[name]


def test_the_page_has_every_family():
    """The table has all families of the transformers version that it names."""
    text = PAGE.read_text()
    if page_version(text) != transformers.__version__:
        pytest.skip(f"the page is about transformers {page_version(text)}")
    rows = page_rows(text)
    assert rows.keys() == set(FAMILIES)
    assert {name: rows[name] for name in _CHOSEN} == _CHOSEN
