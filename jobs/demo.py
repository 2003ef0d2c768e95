#!/usr/bin/env python
"""The whole life of a captioner on this machine, under one Ray: data, training, scores, a bucket, an HTTP question, a report."""

import json
import os
import socket
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

from _job import run_job

from raycap.config import TRAIN_PRESETS, CaptionBucketConfig, DemoConfig, EvaluateConfig, ServeConfig


def demo(config: DemoConfig) -> None:
    """Runs the jobs in sequence; what is finished already is not done again."""
    from raycap.bulk.caption import caption_bucket
    from raycap.cluster import connect
    from raycap.data.demo import make_bucket, make_demo
    from raycap.evaluation.evaluate import evaluate
    from raycap.report import write_report
    from raycap.training.driver import train_captioner

    connect(num_cpus=8, need="the demo")
    checkpoint = f"{config.out}/checkpoint"
    _say("1/6 data set and shards")
    shards = make_demo(config)
    _say("2/6 training")
    training = replace(
        TRAIN_PRESETS["demo"],
        out=config.out,
        train_shards=shards.train,
        val_shards=shards.val,
        tokenizer=shards.tokenizer,
        epochs=config.epochs or TRAIN_PRESETS["demo"].epochs,
        global_batch_size=min(config.num_train, TRAIN_PRESETS["demo"].global_batch_size),
    )
    train_captioner(training)
    _say("3/6 evaluation")
    evaluate(EvaluateConfig(checkpoint=checkpoint, shards=shards.test, out=config.out))
    _say("4/6 captioning a folder, broken files among the images")
    bucket = make_bucket(config.out)
    caption_bucket(CaptionBucketConfig(checkpoint=checkpoint, images=bucket, out=f"{config.out}/captions"))
    _say("5/6 one question over HTTP")
    _ask(checkpoint, sorted(Path(bucket).glob("0*.jpg"))[0])
    _say("6/6 report")
    write_report(config.out)
    print(_next(config.out))


def _say(step: str) -> None:
    print(f"\n== {step}", flush=True)


def _ask(checkpoint: str, image: Path) -> None:
    """Starts the endpoint on a free port, asks for the caption of one image, prints the answer, and stops it."""
    from raycap.serving.run import DIRECT, start, stop

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"{start(ServeConfig(checkpoint=checkpoint, port=port))}/v1/caption"
    try:
        print(f"curl -H 'Content-Type: image/jpeg' --data-binary @{image} {url}")
        request = urllib.request.Request(url, data=image.read_bytes(), headers={"Content-Type": "image/jpeg"})
        with DIRECT.open(request, timeout=60) as response:
            print(json.dumps(json.load(response)), flush=True)
    finally:
        stop()


def _next(out: str) -> str:
    results = json.loads(Path(out, "captions.json").read_text())[:4]
    samples = "\n".join(f"  {result['image_id']:012d}.jpg  {result['caption']}" for result in results)
    python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    return f"""
{samples}

the demo is in {out}: checkpoint/, captions/, metrics.json, and report.html to open in a browser; next, for example:

  {python} jobs/serve.py --checkpoint {out}/checkpoint
  {python} jobs/caption_bucket.py --checkpoint {out}/checkpoint --images /path/to/images --out /path/to/captions
  {python} jobs/evaluate.py --checkpoint {out}/checkpoint --shards {out}/shards/val --out {out}/val
"""


if __name__ == "__main__":
    run_job("demo", {"demo": DemoConfig()}, "__main__:demo")
