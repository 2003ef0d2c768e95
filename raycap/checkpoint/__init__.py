"""The one checkpoint folder: save, load, verify, and opening of published weights, from safetensors and JSON only.

Pickled originals come in through jobs/import_weights.py alone.

Hugging Face layout plus raycap.json, which is written last and names every file with its size and sha256. DeepSpeed's
sharded state is not in here: it lies apart and serves only to resume training.
"""

from raycap.checkpoint.fit import Weights, file_names
from raycap.checkpoint.folder import sha256_of_file
from raycap.checkpoint.layout import complete_config, fresh_config
from raycap.checkpoint.published import import_published, open_checkpoint, open_spec
from raycap.checkpoint.sealed import SEAL, load_checkpoint, save_checkpoint
from raycap.checkpoint.spec import CheckpointSpec
from raycap.checkpoint.weights import export_weights, load_model

__all__ = [
    "SEAL",
    "CheckpointSpec",
    "Weights",
    "complete_config",
    "export_weights",
    "file_names",
    "fresh_config",
    "import_published",
    "load_checkpoint",
    "load_model",
    "open_checkpoint",
    "open_spec",
    "save_checkpoint",
    "sha256_of_file",
]
