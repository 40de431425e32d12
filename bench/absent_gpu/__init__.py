"""A process that takes itself to be on a GPU that is not there, so that the GPU's code is traced and compiled.

Fake tensors on "cuda" have shapes, dtypes and devices, and no numbers. What torch asks of a GPU is answered by
`pretend.py`, from the data sheet of a card (`card.py`). Nothing is undone: use it in a process of its own.
"""
