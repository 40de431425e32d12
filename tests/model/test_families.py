"""Every family of causal language models gives the right numbers, says why it is slower, or is refused by name.

A few families, each for a fault of another kind, are always tried; all others are slow.
"""

from pathlib import Path

import pytest
import transformers

from tests.model.sweep import PAGE, look, page_rows, page_version
from tests.support.families import FAMILIES

_CHOSEN = {  # the layout of each
    "bert+encoder": "refused",  # looks at later tokens
    "bloom": "padded",  # attention of its own that takes no other mask
    "dbrx": "tree",  # its number of experts stands elsewhere
    "deepseek_v4": "padded",  # a mask of its own, routers that not all layers have
    "falcon_h1": "padded",  # state-space branches beside attention
    "gpt_neo": "padded",  # a table of attention classes by name
    "gpt_oss": "tree",  # sinks, with a cache too
    "granitemoehybrid+dense": "tree",  # routers without experts
    "hyperclovax": "tree",  # logits of its own
    "inkling2_text": "padded",  # asks attention for what trees do not compute
    "llama+dynamic": "tree",  # RoPE by the length of a call
    "llama4_text": "padded",  # chunks by places of the row
    "phimoe+longrope": "refused",  # RoPE by the length of a call, in code of its own
    "stablelm": "padded",  # layers that do not hand keywords down
}


def _try(name: str, folder: Path) -> str:
    family = look(name, folder)
    assert family.faults == []
    assert (family.layout == "tree") == (not family.why)
    return family.layout


@pytest.mark.parametrize("name", sorted(_CHOSEN))
def test_faults_of_each_kind(tmp_path: Path, name: str):
    """Right in every layout to 2e-5, or refused; training steps, copies and generation too."""
    assert _try(name, tmp_path) == _CHOSEN[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - _CHOSEN.keys()))
def test_every_family(tmp_path: Path, name: str):
    """As above, for every family of the installed transformers; the layout is that of docs/models.md."""
    text = PAGE.read_text()
    layout = _try(name, tmp_path)
    if page_version(text) == transformers.__version__:
        assert layout == page_rows(text)[name]


def test_the_page_has_every_family():
    """The table is of all families of the version that it names."""
    text = PAGE.read_text()
    if page_version(text) != transformers.__version__:
        pytest.skip(f"the page is about transformers {page_version(text)}")
    rows = page_rows(text)
    assert rows.keys() == set(FAMILIES)
    assert {name: rows[name] for name in _CHOSEN} == _CHOSEN
