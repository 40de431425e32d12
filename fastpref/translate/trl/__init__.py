"""TRL: translate a config of its command line (`trl dpo`, `trl kto`, `trl sft`)."""

from fastpref.translate.rule import Dialect
from fastpref.translate.trl.left_out import GROUPS
from fastpref.translate.trl.rules import RULES
from fastpref.translate.trl.source import OPTION, TRAINER, read

TRL = Dialect(TRAINER, OPTION, read, RULES, GROUPS)
