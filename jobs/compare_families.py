#!/usr/bin/env python
"""The four model families, trained equally long on the demo's images: one table of scores, one page."""

from dataclasses import replace

from _job import run_job

from raycap.config import (
    CLIP_GPT2_PRESETS,
    TRAIN_PRESETS,
    VGG_LSTM_PRESETS,
    VIT_GPT2_PRESETS,
    EvaluateConfig,
    FamiliesConfig,
)

FAMILIES = {
    "blip": TRAIN_PRESETS,
    "clip_gpt2": CLIP_GPT2_PRESETS,
    "vit_gpt2": VIT_GPT2_PRESETS,
    "vgg_lstm": VGG_LSTM_PRESETS,
}


def compare_families(config: FamiliesConfig) -> None:
    """Trains and evaluates one family after the other below config.out; what is finished already is not done again."""
    from raycap import storage
    from raycap.cluster import connect
    from raycap.data.demo import make_demo
    from raycap.evaluation.evaluate import evaluate
    from raycap.report import write_comparison
    from raycap.training.driver import train_captioner

    connect(num_cpus=4, need="the comparison")
    shards = make_demo(config)
    for number, (name, presets) in enumerate(FAMILIES.items(), start=1):
        print(f"\n== {number}/{len(FAMILIES)} {name}", flush=True)
        training = replace(
            presets["demo"],
            out=storage.join(config.out, name),
            train_shards=shards.train,
            val_shards=shards.val,
            tokenizer=shards.tokenizer,
            epochs=config.epochs or presets["demo"].epochs,
            global_batch_size=min(config.num_train, presets["demo"].global_batch_size),
        )
        train_captioner(training)
        evaluate(EvaluateConfig(checkpoint=f"{training.out}/checkpoint", shards=shards.test, out=training.out))
    print(f"\ncomparison: {write_comparison(config.out, list(FAMILIES))}")


if __name__ == "__main__":
    run_job("compare_families", {"families": FamiliesConfig()}, "__main__:compare_families")
