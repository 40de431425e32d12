"""The public interface is defined once, in fastpref/__init__.pyi."""

import subprocess
import sys
import types

import pytest

import fastpref


def test_every_public_name_is_there():
    """Each name of the stub can be imported, and any other name is no attribute."""
    from fastpref.training.start import train

    assert {"train", "load_config", "linear_logprob", "patch", "losses", "UserError"} <= set(fastpref.__all__)
    for name in fastpref.__all__:
        assert getattr(fastpref, name) is getattr(fastpref, name)
        assert name in dir(fastpref)
    assert fastpref.train is train
    assert isinstance(fastpref.patch, types.ModuleType)
    assert callable(fastpref.patch)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        getattr(fastpref, "trian")  # noqa: B009 (pyright knows that it does not exist)


def test_the_package_and_its_help_do_not_wait_for_torch():
    """Neither `import fastpref` nor the command line's module imports torch or a library that does."""
    code = "import sys, fastpref, fastpref.cli; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
