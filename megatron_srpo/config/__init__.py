"""The configuration: one tree of typed models, read from TOML plus dotted overrides.

    schema.py        the models: keys, types, defaults, meanings
    load.py          TOML file + overrides → Config; Config → TOML file
    check.py         what the types cannot say: contradictions, also with the model and the number of ranks
    check_files.py   whether the data and the rewards' files are there, and the output folder can be
    model_folder.py  whether the model is there, whole, and supported
    reference.py     the table of all keys for docs/configuration.md

Every refusal is one `ConfigError` that lists all problems: key, value, what was expected, and the cure.
"""

from megatron_srpo.config.check import check, contradictions, layout_problems, listed
from megatron_srpo.config.check_lora import published_adapters, starts_with_publish
from megatron_srpo.config.load import load_config, nearest_key, save_resolved, to_toml
from megatron_srpo.config.model_folder import read_model_folder, require_tokenizer_folder
from megatron_srpo.config.schema import (
    BUCKET_MIB,
    CheckpointConfig,
    Config,
    DataConfig,
    EnvironmentConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    ObserveConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "BUCKET_MIB",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "LoraConfig",
    "ModelConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TeacherConfig",
    "TrainConfig",
    "check",
    "contradictions",
    "layout_problems",
    "listed",
    "load_config",
    "nearest_key",
    "published_adapters",
    "read_model_folder",
    "require_tokenizer_folder",
    "save_resolved",
    "starts_with_publish",
    "to_toml",
]
