#!/usr/bin/env python
"""Train or fine-tune BLIP: `train_blip.py [PRESET] --flags`. Without arguments: the demo. Run again to resume."""

from _job import run_job

from raycap.config import TRAIN_PRESETS

if __name__ == "__main__":
    run_job("train_blip", TRAIN_PRESETS, "raycap.training.driver:train_captioner")
