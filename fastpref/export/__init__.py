"""`fastpref export`: write a trained model as a GGUF file for llama.cpp and Ollama, one tensor at a time.

weights.py reads and merges tensors, tensors.py names and orders them for llama.cpp, families.py says which models can
be written, settings.py and rope.py describe them, vocabulary.py, words.py and pieces.py write the tokenizer,
quantise.py rounds, adapter.py writes adapters alone, and card.py, modelfile.py and chat_text.py write what lies beside.
"""

from importlib.util import find_spec

from fastpref.errors import UserError

if find_spec("gguf") is None:
    raise UserError('export needs the package gguf: pip install "fastpref[export]"')

from fastpref.export.adapter import export_adapter
from fastpref.export.model import Exported, default_output, export_model

__all__ = ["Exported", "default_output", "export_adapter", "export_model"]
