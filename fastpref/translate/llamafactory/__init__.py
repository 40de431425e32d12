"""LLaMA-Factory: translate a config of the stage dpo, kto or sft."""

from fastpref.translate.llamafactory.left_out import GROUPS
from fastpref.translate.llamafactory.rules import RULES
from fastpref.translate.llamafactory.source import OPTION, TRAINER, read
from fastpref.translate.rule import Dialect

LLAMAFACTORY = Dialect(TRAINER, OPTION, read, RULES, GROUPS)
