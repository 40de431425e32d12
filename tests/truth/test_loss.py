"""The laws of the preference losses' kernels, as tests/kernels states them, for compiled kernels."""

from tests.kernels.test_preference_loss_triton import *  # noqa: F403
