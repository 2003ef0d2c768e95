#!/usr/bin/env python
"""Train ViT-GPT2: `train_vit_gpt2.py [PRESET] --flags`. Without arguments: on the demo's images. Run again to resume."""

from _job import run_job

from raycap.config import VIT_GPT2_PRESETS

if __name__ == "__main__":
    run_job("train_vit_gpt2", VIT_GPT2_PRESETS, "raycap.training.driver:train_captioner")
