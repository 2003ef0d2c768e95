#!/usr/bin/env python
"""The whole demo on this machine: data set, shards, training and evaluation under one Ray."""

from dataclasses import replace

from _job import run_job

from raycap.config import TRAIN_PRESETS, DemoConfig, EvaluateConfig


def demo(config: DemoConfig) -> None:
    """Runs the jobs in sequence; what is finished already is not done again."""
    from raycap.cluster import connect
    from raycap.data.demo import make_demo
    from raycap.evaluation.evaluate import evaluate
    from raycap.training.driver import train_blip

    connect(num_cpus=8, need="the demo")
    shards = make_demo(config)
    train = replace(
        TRAIN_PRESETS["demo"],
        out=config.out,
        train_shards=shards.train,
        val_shards=shards.val,
        tokenizer=shards.tokenizer,
        epochs=config.epochs or TRAIN_PRESETS["demo"].epochs,
        global_batch_size=min(config.num_train, TRAIN_PRESETS["demo"].global_batch_size),
    )
    train_blip(train)
    evaluate(EvaluateConfig(checkpoint=f"{config.out}/checkpoint", shards=shards.test, out=config.out))
    print(
        f"\nthe checkpoint is {config.out}/checkpoint; its scores on pairs of objects it never saw: {config.out}/metrics.json"
    )


if __name__ == "__main__":
    run_job("demo", {"demo": DemoConfig()}, "__main__:demo")
