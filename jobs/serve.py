#!/usr/bin/env python
"""Checkpoint -> HTTP endpoint: POST an image to /v1/caption, get its caption as JSON. Runs until SIGINT or SIGTERM."""

from _job import run_job

from raycap.config import ServeConfig

if __name__ == "__main__":
    run_job("serve", {"serve": ServeConfig()}, "raycap.serving.run:serve")
