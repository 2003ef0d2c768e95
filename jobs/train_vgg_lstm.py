#!/usr/bin/env python
"""Train VGG16-LSTM: `train_vgg_lstm.py [PRESET] --flags`. Without arguments: on the demo's images. Run again to resume."""

from _job import run_job

from raycap.config import VGG_LSTM_PRESETS

if __name__ == "__main__":
    run_job("train_vgg_lstm", VGG_LSTM_PRESETS, "raycap.training.driver:train_captioner")
