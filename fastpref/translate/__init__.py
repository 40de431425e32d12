"""`fastpref init --from-…`: translate the configs of other trainers.

Each trainer has a folder: its source.py reads a config, rules.py and the modules beside it translate it field by field,
and left_out.py gives the reasons for fields without a counterpart.
"""

from fastpref.translate.axolotl import AXOLOTL
from fastpref.translate.fields import Left, Setting
from fastpref.translate.llamafactory import LLAMAFACTORY
from fastpref.translate.rule import Dialect, Rule
from fastpref.translate.translation import Translation, translate
from fastpref.translate.trl import TRL

__all__ = ["DIALECTS", "Dialect", "Left", "Rule", "Setting", "Translation", "translate"]

DIALECTS = {dialect.option: dialect for dialect in (AXOLOTL, TRL, LLAMAFACTORY)}
"""The trainers whose configs are translated, by the option of `fastpref init`."""
