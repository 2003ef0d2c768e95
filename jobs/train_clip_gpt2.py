#!/usr/bin/env python
"""Train CLIP-GPT2 (ClipCap): `train_clip_gpt2.py [PRESET] --flags`. Without arguments: on the demo's images. Run again to resume."""

from _job import run_job

from raycap.config import CLIP_GPT2_PRESETS

if __name__ == "__main__":
    run_job("train_clip_gpt2", CLIP_GPT2_PRESETS, "raycap.training.driver:train_captioner")
