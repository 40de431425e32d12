"""The config of a run: the schema of its TOML file, how the file is loaded, and the options of each loss."""

from fastpref.config.data import DataConfig, TokensConfig
from fastpref.config.load import load_config, make_config
from fastpref.config.model import LoraConfig, ModelConfig, is_pattern
from fastpref.config.schema import Config

__all__ = [
    "Config", "DataConfig", "LoraConfig", "ModelConfig", "TokensConfig", "is_pattern", "load_config", "make_config",
]  # fmt: skip
