#!/usr/bin/env python
"""Checkpoint + split -> BLEU, METEOR, ROUGE-L, CIDEr, captions in COCO's results format, and report.html."""

from _job import run_job

from raycap.config import EvaluateConfig

if __name__ == "__main__":
    run_job("evaluate", {"evaluate": EvaluateConfig()}, "raycap.evaluation.evaluate:evaluate")
