"""The losses, as functions of the log-probabilities of whole completions and of tokens."""

from fastpref.config.losses import CPO, DPO, IPO, KTO, ORPO, PL, SFT, LiPO, LossOptions, SimPO
from fastpref.losses.lists import ListLogps, lipo_loss, list_loss, pl_loss
from fastpref.losses.pairs import (
    PairLogps,
    WholeStep,
    cpo_loss,
    dpo_loss,
    length_weights,
    orpo_loss,
    pair_loss,
    simpo_loss,
    wpo_weights,
)
from fastpref.losses.result import PreferenceLoss, Totals
from fastpref.losses.rows import RowLogps, kto_kl, kto_loss
from fastpref.losses.supervised import sft_loss

__all__ = [
    "CPO",
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "PL",
    "SFT",
    "LiPO",
    "ListLogps",
    "LossOptions",
    "PairLogps",
    "PreferenceLoss",
    "RowLogps",
    "SimPO",
    "Totals",
    "WholeStep",
    "cpo_loss",
    "dpo_loss",
    "kto_kl",
    "kto_loss",
    "length_weights",
    "lipo_loss",
    "list_loss",
    "orpo_loss",
    "pair_loss",
    "pl_loss",
    "sft_loss",
    "simpo_loss",
    "wpo_weights",
]
