"""Silence for messages of libraries that a user can do nothing about."""

import logging
import warnings

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Turn off progress bars, and warnings about code that is not the user's."""
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it says which kernels for other devices are not there
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # PEFT, of an adapter on a head that is tied to the embeddings: the two stay apart here, and `merge` unties them.
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*", category=UserWarning)
    # PEFT, of adapters on fused experts, whose rank patterns it makes itself, and of GPT-2's transposed layers.
    warnings.filterwarnings("ignore", message=".*_pattern keys did not match.*", category=RuntimeWarning)
    warnings.filterwarnings("ignore", message=".*fan_in_fan_out is set to False.*", category=UserWarning)
