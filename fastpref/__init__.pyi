# The public interface: type checkers read this file, and __init__.py imports each name from where it stands here.
from fastpref import losses as losses
from fastpref.config import Config as Config
from fastpref.config import load_config as load_config
from fastpref.errors import UserError as UserError
from fastpref.losses.result import PreferenceLoss as PreferenceLoss
from fastpref.losses.token_loss import preference_loss as preference_loss
from fastpref.ops import FourBitWeight as FourBitWeight
from fastpref.ops import LoraWeight as LoraWeight
from fastpref.ops import OffloadedWeight as OffloadedWeight
from fastpref.ops import TokenLogprobs as TokenLogprobs
from fastpref.ops import linear_logprob as linear_logprob
from fastpref.patch import Patch as Patch
from fastpref.patch import patch as patch
from fastpref.patch import unpatch as unpatch
from fastpref.training.callbacks import RunEvent as RunEvent
from fastpref.training.loop import RunResult as RunResult
from fastpref.training.start import train as train

__version__: str
__all__: list[str]
