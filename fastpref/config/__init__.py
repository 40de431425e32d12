"""The config of a run: the schema of its TOML file, how the file is loaded, and the options of each loss."""

from fastpref.config.load import load_config, make_config
from fastpref.config.schema import Config, DataConfig, LoraConfig, ModelConfig, TokensConfig, is_pattern

__all__ = [
    "Config", "DataConfig", "LoraConfig", "ModelConfig", "TokensConfig", "is_pattern", "load_config", "make_config",
]  # fmt: skip
