"""The names of the losses, apart from their options, so that help can list them without the schema of a config."""

LOSS_TITLES = {
    "dpo": "DPO", "ipo": "IPO", "kto": "KTO", "orpo": "ORPO", "simpo": "SimPO", "cpo": "CPO", "pl": "PL",
    "lipo": "LiPO", "sft": "SFT",
}  # fmt: skip
"""The name that people write, by the name that `loss.type` takes, in the order in which losses are listed."""
