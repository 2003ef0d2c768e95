#!/usr/bin/env python
"""Checkpoint + split -> metrics.json (BLEU, METEOR, ROUGE-L, CIDEr) and captions.json in COCO's results format."""

from _job import run_job

from raycap.config import EvaluateConfig

if __name__ == "__main__":
    run_job("evaluate", {"evaluate": EvaluateConfig()}, "raycap.evaluation.evaluate:evaluate")
