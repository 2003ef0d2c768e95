#!/usr/bin/env python
"""Checkpoint + folder or bucket of images -> one caption row per image, broken images included. Run again to resume."""

from _job import run_job

from raycap.config import CaptionBucketConfig

if __name__ == "__main__":
    run_job("caption_bucket", {"caption_bucket": CaptionBucketConfig()}, "raycap.bulk.caption:caption_bucket")
