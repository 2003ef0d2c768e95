"""One checkpoint of each family says the same in process, in bulk and over HTTP, with its fixtures in a folder and on S3."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from s3_server import BUCKET, free_port
from tiny import png_images
from tiny_families import TEXT, TOKENIZER

from raycap import Captioner, storage
from raycap.bulk.caption import caption_bucket
from raycap.checkpoint import export_weights, save_checkpoint
from raycap.config import CaptionBucketConfig, ServeConfig, TrainConfig
from raycap.schema import CaptionResult, DecodeSettings
from raycap.serving.run import start, stop
from raycap.text import save_tokenizer
from raycap.training.start import build_start

pytestmark = [pytest.mark.ray, pytest.mark.s3]

# Seed, and how many times as large matrices are as where training starts: the images have captions of their own.
DRAWN = {"blip": (0, 2.0), "clip_gpt2": (0, 4.0), "vit_gpt2": (0, 6.0), "vgg_lstm": (2, 4.0)}
Answer = tuple[str | None, str | None]  # caption, error kind
GAP = 1e-3  # DESIGN's fixtures: no caption hangs on a smaller difference of log-probabilities


def bucket_files() -> dict[str, bytes]:
    """16 images by key, two of them broken."""
    images = {f"{n % 3}/image {n:02d}.png": image for n, image in enumerate(png_images(14))}
    return images | {"0/cut.png": images["0/image 00.png"][:100], "a-page.jpg": b"<html>404</html>"}


def write_checkpoint(family: str, root: str, tokenizer: str) -> None:
    """The family's tiny preset at 32 pixels, drawn by DRAWN."""
    seed, spread = DRAWN[family]
    config = TrainConfig(
        architecture=f"{family}_tiny",  # type: ignore[arg-type]  # one of the literals
        train_shards="/none",
        val_shards="/none",
        tokenizer=tokenizer,
        image_size=32,
        max_new_tokens=12,
        seed=seed,
    )
    spec, model = build_start(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(spread)
    save_checkpoint(root, export_weights(model), spec, {"step": 0})


PLACES = [("blip", "folder"), ("blip", "s3"), ("clip_gpt2", "s3"), ("vit_gpt2", "folder"), ("vgg_lstm", "folder")]


@pytest.fixture(scope="module", params=PLACES, ids="-".join)
def roots(
    request: pytest.FixtureRequest, ray_cluster: str, s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Where checkpoint, images and output lie: all in a folder, or all on S3."""
    family, place = request.param
    root = f"s3://{BUCKET}/parity/{family}" if place == "s3" else str(tmp_path_factory.mktemp("parity"))
    roots = {name: storage.join(root, name) for name in ("checkpoint", "images", "out")}
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(TOKENIZER, TEXT, str(tokenizer))
    write_checkpoint(family, roots["checkpoint"], str(tokenizer))
    for key, data in bucket_files().items():
        storage.put(storage.join(roots["images"], key), data)
    return roots


@pytest.fixture(scope="module")
def endpoint(roots: dict[str, str]) -> Iterator[str]:
    yield start(ServeConfig(checkpoint=roots["checkpoint"], port=free_port(), micro_batch_size=4))
    stop()


def ask(endpoint: str, data: bytes, query: str) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{endpoint}/v1/caption{query}", data=data, headers={"Content-Type": "image/jpeg"}, method="POST"
    )
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        answer: dict[str, Any] = json.load(response)
    assert response.status == (422 if "error_kind" in answer else 200), answer
    return answer


def in_process(captioner: Captioner, settings: DecodeSettings) -> dict[str, CaptionResult]:
    files = bucket_files()
    return dict(zip(files, captioner.caption(list(files.values()), settings), strict=True))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_sixteen_images_two_of_them_broken_have_the_same_answers_at_all_three_doors(
    roots: dict[str, str], endpoint: str, num_beams: int
) -> None:
    captioner = Captioner.load(roots["checkpoint"])
    settings = captioner.spec.decode.override(num_beams=num_beams)
    here = {key: (result.caption, result.error_kind) for key, result in in_process(captioner, settings).items()}
    out = storage.join(roots["out"], str(num_beams))
    summary = caption_bucket(
        CaptionBucketConfig(
            checkpoint=roots["checkpoint"],
            images=roots["images"],
            out=out,
            num_beams=num_beams,
            unit_size=5,
            format="jsonl",
        )
    )
    in_bulk: dict[str, Answer] = {}
    for name in storage.list_files(storage.join(out, "data")):
        for line in storage.read_bytes(storage.join(out, "data", name)).decode().splitlines():
            row = json.loads(line)
            assert row["key"] not in in_bulk
            in_bulk[row["key"]] = (row["caption"], row["error_kind"])
    answers = {key: ask(endpoint, data, f"?num_beams={num_beams}") for key, data in bucket_files().items()}
    over_http = {key: (answer.get("caption"), answer.get("error_kind")) for key, answer in answers.items()}
    assert in_bulk == here
    assert over_http == here
    assert sorted(kind for _, kind in here.values() if kind) == ["not_an_image", "truncated"]
    assert len({caption for caption, _ in here.values()}) >= 8, "captions must tell the images apart"
    assert summary["num_images"] == 16
    assert summary["errors"] == {"not_an_image": 1, "truncated": 1}


def test_the_captions_compared_hang_on_no_near_tie(roots: dict[str, str]) -> None:
    """Each image's second best caption is clearly worse, so no rounding decides: with beams their scores say so."""
    captioner = Captioner.load(roots["checkpoint"])
    settings = captioner.spec.decode.override(num_beams=3, num_candidates=2)
    results = [result for result in in_process(captioner, settings).values() if result.caption is not None]
    assert len(results) == 14
    for result in results:
        best, second = (candidate.score for candidate in result.candidates)
        assert abs(best - second) > GAP, result
