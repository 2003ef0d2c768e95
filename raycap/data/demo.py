"""The demo's inputs, made once below its output root and found again by every job without flags: shards, and a bucket."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raycap import storage
from raycap.config import DemoConfig
from raycap.data.prepare import prepare_shards
from raycap.datasets.coco import read_coco
from raycap.datasets.demo import write_demo
from raycap.errors import UserError
from raycap.shards import MANIFEST
from raycap.text import TextSpec, role_ids, save_tokenizer, train_wordpiece

SPLITS = ("train", "val", "test")
LAST_OF_BUCKET = "empty.png"


@dataclass(frozen=True, kw_only=True)
class DemoShards:
    """Roots of the demo's shards, and the folder of its tokenizer."""

    train: str
    val: str
    test: str
    tokenizer: str


def demo_shards(out: str) -> DemoShards:
    """Where the demo below `out` keeps its shards, whether or not they exist."""
    roots = {split: storage.join(out, "shards", split) for split in SPLITS}
    return DemoShards(tokenizer=storage.join(out, "data", "tokenizer"), **roots)


def find_or_make_demo(out: str, report: Callable[[str], None] = print) -> DemoShards:
    """The demo's shards below `out`, of whatever size they were made; made of the default size if they are missing."""
    demo = demo_shards(out)
    if all(storage.exists(storage.join(root, MANIFEST)) for root in (demo.train, demo.val, demo.test)):
        return demo
    return make_demo(DemoConfig(out=out), report)


def make_demo(config: DemoConfig, report: Callable[[str], None] = print) -> DemoShards:
    """The demo's images, tokenizer and shards; what is there already stays. Needs Ray.

    Raises UserError if config.out holds a demo of another size or seed.
    """
    demo = demo_shards(config.out)
    data = storage.join(config.out, "data")
    report(f"the demo data set: {config.num_train} + {config.num_val} + {config.num_test} images in {data}")
    write_demo(
        storage.join(data, "coco"),
        num_train=config.num_train,
        num_val=config.num_val,
        num_test=config.num_test,
        seed=config.seed,
    )
    for split in SPLITS:
        annotations = storage.join(data, "coco", "annotations", f"captions_{split}.json")
        images = storage.join(data, "coco", "images", split)
        if split == "train":
            _make_tokenizer(annotations, images, demo.tokenizer)
        prepare_shards(annotations, images, storage.join(config.out, "shards", split), report=report)
    return demo


def demo_bucket(out: str) -> str:
    """Where the demo below `out` keeps the folder of images that is captioned in bulk, whether or not it exists."""
    return storage.join(out, "data", "bucket")


def make_bucket(out: str) -> str:
    """That folder: the demo's test images, and three files such as every real bucket holds; what is there already stays."""
    bucket = Path(demo_bucket(out))
    bucket.mkdir(parents=True, exist_ok=True)
    images = sorted(Path(storage.join(out, "data", "coco", "images", "test")).iterdir())
    for image in images:
        if not (bucket / image.name).exists():
            shutil.copy(image, bucket)
    storage.put_new(str(bucket / "cut-off.jpg"), images[0].read_bytes()[:1500])
    storage.put_new(str(bucket / "an-error-page.jpg"), b"<!DOCTYPE html><title>404 Not Found</title>")
    storage.put_new(str(bucket / LAST_OF_BUCKET), b"")
    return str(bucket)


def given_or_demo(given: str, place: str, marker: str, *, to: str, flags: str) -> str:
    """`given`, else the demo's `place`. marker: a file in it. Raises UserError, naming job and flags, if the demo is not there."""
    if not given and not storage.exists(storage.join(place, marker)):
        raise UserError(
            f"no demo to {to}: {place!r} is not there; run make demo and `export RAYCAP_RUNS=$PWD/runs`, or give {flags}"
        )
    return given or place


def _make_tokenizer(annotations: str, images: str, folder: str) -> None:
    tokenizer = train_wordpiece(
        caption for sample in read_coco(annotations, images).samples for caption in sample.captions
    )
    bos_id, eos_id, pad_id = role_ids(tokenizer)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, TextSpec(prompt="", bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, max_tokens=512), folder)
