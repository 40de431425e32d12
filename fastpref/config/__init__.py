"""What a run is told: the schema of its TOML file, the file's loading, and the options of each loss."""

from fastpref.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    TokensConfig,
    TrainConfig,
    is_pattern,
    load_config,
    make_config,
)

__all__ = [
    "Config",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "ModelConfig",
    "TokensConfig",
    "TrainConfig",
    "is_pattern",
    "load_config",
    "make_config",
]
