#!/usr/bin/env python
"""Weights of others -> a checkpoint folder: BLIP's, ClipCap's and VGG16's original files, or pretrained towers put together."""

from _job import run_job

from raycap.config import ImportConfig

if __name__ == "__main__":
    run_job("import_weights", {"import_weights": ImportConfig()}, "raycap.checkpoint.imports:import_weights")
