"""The first minutes on a GPU: whether every kernel is right there, then how fast it is: `python -m bench first-card`.

Nothing is downloaded, and models have random weights that are made on the GPU. Each block runs in a process of its own,
which is stopped when its time is over, so that a hang costs one block. An illegal access costs one case: the block goes
on in another process. Every case is written to a file as soon as it is known. A case whose packages are not installed
is left out, and the table says so.

    blocks.py       the blocks in their order, and their shares of the time
    outcome.py      what a case results in, and how cases are run and written
    parent.py       starts the blocks, and collects what they wrote
    table.py        the table that is printed last
    sizes.py        the sizes on a GPU, and tiny ones for a CPU

The blocks are `limits.py` (what the GPU itself reaches), `numerics.py`, `attention.py`, `heads.py`, `steps.py` and
`streamed.py`.
"""
