#!/usr/bin/env python
"""Captions and images of a known data set -> WebDataset shards with a manifest. Without flags: the demo. Run again to resume."""

from dataclasses import asdict
from functools import partial

from _job import run_job

from raycap.config import PrepareConfig


def prepare(config: PrepareConfig) -> None:
    """Packs the given data set, or makes and packs the demo's."""
    from raycap.cluster import connect
    from raycap.data.demo import find_or_make_demo
    from raycap.data.prepare import prepare_shards

    start = partial(connect, num_cpus=2, need="packing shards")
    if config.images:
        prepare_shards(**asdict(config), connect=start)
    else:
        start()
        demo = find_or_make_demo(config.out)
        print(f"no --images: the demo's shards are {demo.train}, {demo.val} and {demo.test}")


if __name__ == "__main__":
    run_job("prepare_shards", {"coco": PrepareConfig()}, "__main__:prepare")
