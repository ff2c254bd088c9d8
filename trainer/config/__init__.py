"""Every setting of a run, on pages that import nothing heavy.

`RunConfig` has all sections; `load_config` reads it from YAML files and `key=value`. docs/settings.md
lists every setting; trainer.config.changes says which of them may change when a run is resumed.
"""

from embeddings.config import TableConfig
from syncrec.config import ModelConfig
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.evaluation import EvaluationConfig, SplitConfig
from trainer.config.load import load_config, load_recorded, to_yaml
from trainer.config.negatives import NegativesConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.config.retraining import PublishConfig, RetrainConfig
from trainer.config.run import LogConfig, RunConfig
from trainer.config.stream import SourceConfig, StreamConfig

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "LogConfig",
    "ModelConfig",
    "NegativesConfig",
    "OptimizerConfig",
    "PublishConfig",
    "RetrainConfig",
    "RunConfig",
    "SourceConfig",
    "SplitConfig",
    "StreamConfig",
    "TableConfig",
    "load_config",
    "load_recorded",
    "to_yaml",
]
