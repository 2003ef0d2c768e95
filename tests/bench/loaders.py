"""Loading for training, side by side in one run: 640x427 JPEGs from tars to batches of 32 at 384 pixels, on two CPUs.

Ours is the stream that training uses, through Ray Data. The peers are what people write: webdataset with Pillow and float32,
Ray Data's read_webdataset with a map to float32, and torch's DataLoader over our own reading and decoding, which shows what
Ray costs. Ours and the
last one decode="fast". Every side yields each of the images once; all pixels are compared first. A rate counts from the first batch to
the last, so processes starting are left out; sides take turns, and the medians are compared.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch
import webdataset
from PIL import Image

from raycap import cluster, storage
from raycap.data.batch import Source
from raycap.data.stream import iterate, quiet_context
from raycap.image import prepare_bytes
from raycap.order import InOrder
from raycap.schema import ImageSpec, Sample
from raycap.shards import Manifest, pack_shard, read_manifest, read_run, write_manifest
from raycap.text import text_spec, train_wordpiece

NUM_SHARDS, SAMPLES_PER_SHARD, RUNS = 12, 250, 3
BATCH, SIZE, CPUS = 32, 384, 2
CAPTIONS = ("a dog on a beach", "a brown dog runs along the sea", "sand, sea and a dog", "a dog", "the dog of a friend")
Batches = Iterator[tuple[list[str], Any]]  # keys and pixels


def write_shards(root: str) -> Manifest:
    """Images that look like photographs to a decoder: about 70 KB each."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(50):
        layers = [
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize(
                (640, 427), Image.Resampling.BICUBIC
            )
            for side in (4, 16, 64, 200)
        ]
        mixed = np.mean([np.asarray(layer, np.float32) for layer in layers], axis=0)
        buffer = io.BytesIO()
        Image.fromarray(mixed.astype(np.uint8)).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    indexes = []
    for shard in range(NUM_SHARDS):
        numbers = range(shard * SAMPLES_PER_SHARD, (shard + 1) * SAMPLES_PER_SHARD)
        samples = [Sample(key=f"{i:06d}", image=images[i % 50], ext="jpg", captions=CAPTIONS) for i in numbers]
        data, index = pack_shard(f"shard-{shard:05d}.tar", samples)
        storage.put_new(storage.join(root, index.shard), data)
        indexes.append(index)
    write_manifest(root, indexes)
    return read_manifest(root)


SPEC = ImageSpec(size=SIZE, decode="fast")


def source() -> Source:
    tokenizer = train_wordpiece(CAPTIONS)
    return Source(
        image=SPEC,
        text=text_spec(tokenizer),
        tokenizer=tokenizer.to_str(),
        captions_per_image=1,
        seed=0,
    )


def ours(manifest: Manifest) -> Batches:
    order = InOrder(shard_sizes=manifest.sizes, num_samples=manifest.num_samples, global_batch_size=BATCH)
    batches = iterate(
        order, 0, 1, manifest=ray.put(manifest), source=source(), start=0, stop=order.num_steps, num_cpus=CPUS
    )
    for batch in batches:
        real = [key != "" for key in batch.keys]
        yield [key for key in batch.keys if key], batch.pixel_values[: sum(real)]


def through_webdataset(manifest: Manifest) -> Batches:
    """webdataset's own pipeline: Pillow, a square of 384 pixels, float32, collated in two worker processes."""

    def prepare(sample: dict[str, Any]) -> tuple[str, torch.Tensor]:
        pixels = sample["jpg"].convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return sample["__key__"], torch.from_numpy(np.asarray(pixels).transpose(2, 0, 1).astype(np.float32) / 255)

    urls = [storage.join(manifest.root, shard) for shard in manifest.shards]
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").map(prepare).batched(BATCH)
    for keys, pixels in webdataset.WebLoader(data, batch_size=None, num_workers=CPUS):
        yield list(keys), pixels


def through_ray_data(manifest: Manifest) -> Batches:
    """As the documentation of Ray Data shows it: decoded images as rows, mapped to float32 one by one."""

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        pixels = Image.fromarray(row["jpg"]).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return {"key": row["__key__"], "pixels": np.asarray(pixels).transpose(2, 0, 1).astype(np.float32) / 255}

    urls = [storage.join(manifest.root, shard) for shard in manifest.shards]
    context = quiet_context()
    context.target_max_block_size = 128 * 2**20  # Ray Data's default, which ours turns off
    with ray.data.DataContext.current(context):
        data = ray.data.read_webdataset(urls).map(prepare)
    for batch in data.iter_batches(batch_size=BATCH, batch_format="numpy"):
        yield list(batch["key"]), batch["pixels"]


class Samples(torch.utils.data.Dataset[tuple[str, torch.Tensor]]):
    """Our reading and decoding, a sample at a time."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest, self._image = manifest, SPEC

    def __len__(self) -> int:
        return self._manifest.num_samples

    def __getitem__(self, number: int) -> tuple[str, torch.Tensor]:
        shard, index = self._manifest.locate(number)
        (sample,) = read_run(self._manifest, shard, index, index + 1)
        assert isinstance(sample, Sample)
        return sample.key, torch.from_numpy(prepare_bytes(sample.image, self._image).pixels)


def through_dataloader(manifest: Manifest) -> Batches:
    for keys, pixels in torch.utils.data.DataLoader(Samples(manifest), batch_size=BATCH, num_workers=CPUS):
        yield list(keys), pixels


def images_per_s(batches: Batches) -> float:
    """From the first batch to the last."""
    begun, count = 0.0, 0
    for keys, _ in batches:
        if begun:
            count += len(keys)
        begun = begun or time.perf_counter()
    return count / (time.perf_counter() - begun)


def same_pixels(ours: Batches, theirs: Batches) -> bool:
    """Whether both sides yield every image once, to within two levels, nearly all equal."""

    def sums(batches: Batches) -> dict[str, np.ndarray]:
        found = {}
        for keys, pixels in batches:
            scale = 255 if np.asarray(pixels).dtype == np.float32 else 1
            for key, image in zip(keys, np.asarray(pixels), strict=True):
                assert key not in found, key
                found[key] = np.rint(image[:, ::7, ::7] * scale).astype(np.int16)
        return found

    a, b = sums(ours), sums(theirs)
    return a.keys() == b.keys() and all(
        np.abs(a[key] - b[key]).max() <= 2 and np.abs(a[key] - b[key]).mean() < 0.01 for key in a
    )


def compare(name: str, peer: Callable[[Manifest], Batches], must: float, aim: float) -> dict[str, Any]:
    cluster.connect(num_cpus=CPUS, need=f"{CPUS} for the loader")
    with tempfile.TemporaryDirectory() as root:
        manifest = write_shards(str(Path(root)))
        identical = same_pixels(ours(manifest), peer(manifest))
        assert identical, f"{name}: both sides must yield the same pixels"
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(RUNS):
            rates[0].append(images_per_s(ours(manifest)))
            rates[1].append(images_per_s(peer(manifest)))
    a, b = (statistics.median(side) for side in rates)
    ratios = [x / y for x, y in zip(*rates, strict=True)]
    return {
        "name": name,
        "ours": round(a, 1),
        "peer": round(b, 1),
        "unit": "images/s",
        "ratio": round(a / b, 2),
        "must": must,
        "aim": aim,
        "spread": round((max(ratios) - min(ratios)) / statistics.median(ratios), 3),
        "identical": identical,
    }


def measure_webdataset() -> dict[str, Any]:
    return compare("loader_vs_webdataset", through_webdataset, 3, 4.2)


def measure_raydata() -> dict[str, Any]:
    return compare("loader_vs_raydata", through_ray_data, 2.5, 3)


def measure_dataloader() -> dict[str, Any]:
    return compare("loader_vs_dataloader", through_dataloader, 0.9, 1.1)
