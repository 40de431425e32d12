"""Axolotl: translate a config of a preference method, or of supervised training on conversations.

source.py reads the config, rules.py and rows.py translate it field by field, and left_out.py gives the reasons for
fields without a counterpart.
"""

from fastpref.translate.axolotl.left_out import EVEN_IF_OFF, GROUPS
from fastpref.translate.axolotl.rules import RULES
from fastpref.translate.axolotl.source import OPTION, TRAINER, read
from fastpref.translate.rule import Dialect

AXOLOTL = Dialect(TRAINER, OPTION, read, RULES, GROUPS, EVEN_IF_OFF)
