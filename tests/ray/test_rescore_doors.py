"""A scorer chooses the same captions in process, in bulk, in an evaluation and over HTTP."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import pack
from s3_server import free_port
from test_scorer import write_scorer
from tiny import png_images, tiny_checkpoint

from raycap import Captioner, Scorer, storage
from raycap.bulk.caption import caption_bucket
from raycap.checkpoint import export_weights, save_checkpoint
from raycap.config import CaptionBucketConfig, EvaluateConfig, ServeConfig
from raycap.evaluation.evaluate import evaluate
from raycap.schema import Sample
from raycap.serving.run import start, stop

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:.*is unverified:UserWarning")]


def ask(url: str, data: bytes | None = None) -> Any:
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_every_door_answers_what_the_scorer_chose(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, model, _ = tiny_checkpoint(seed=3)
    door: dict[str, Any] = {"checkpoint": f"{tmp_path}/checkpoint", "scorer": f"{tmp_path}/scorer", "num_beams": 4}
    save_checkpoint(door["checkpoint"], export_weights(model), spec, {"step": 0})
    write_scorer(Path(door["scorer"]), spec.tokenizer, 32)
    images = {f"{n}.png": image for n, image in enumerate(png_images(8))}
    for key, data in images.items():
        storage.put(f"{tmp_path}/images/{key}", data)
    settings = spec.decode.override(num_beams=4, num_candidates=2)
    unscored = Captioner.load(door["checkpoint"]).caption(list(images.values()), settings)
    captioned = Captioner.load(door["checkpoint"], scorer=door["scorer"]).caption(list(images.values()), settings)
    here = {key: (r.caption, [c.caption for c in r.candidates]) for key, r in zip(images, captioned, strict=True)}
    matches = pytest.approx([result.match for result in captioned], abs=1e-5)
    assert sum(a.caption != b.caption for a, b in zip(captioned, unscored, strict=True)) > 2

    out = f"{tmp_path}/out"
    bulk = CaptionBucketConfig(**door, images=f"{tmp_path}/images", out=out, num_candidates=2, format="jsonl")
    caption_bucket(bulk)
    rows = [json.loads(line) for line in storage.read_bytes(f"{out}/data/unit-00000000.jsonl").decode().splitlines()]
    assert {row["key"]: (row["caption"], [c["caption"] for c in row["candidates"]]) for row in rows} == here
    assert [row["match"] for row in rows] == matches
    fingerprint = Scorer.load(door["scorer"]).fingerprint
    assert json.loads(storage.read_bytes(f"{out}/job.json"))["scorer"] == fingerprint

    samples = [Sample(key=key, image=data, ext="png", captions=("two dogs",)) for key, data in images.items()]
    shards = pack(f"{tmp_path}/shards", samples)
    evaluate(EvaluateConfig(**door, shards=shards, out=f"{tmp_path}/evaluated"))
    lines = storage.read_bytes(f"{tmp_path}/evaluated/per_image.jsonl").decode().splitlines()
    evaluated = {row["key"]: row["caption"] for row in map(json.loads, lines)}
    assert evaluated == {key: caption for key, (caption, _) in here.items()}
    about = json.loads(storage.read_bytes(f"{tmp_path}/evaluated/metrics.json"))
    assert (about["scorer"], about["scorer_fingerprint"]) == (door["scorer"], fingerprint)

    url = start(ServeConfig(**door, num_candidates=2, port=free_port()))
    try:
        answers = {key: ask(f"{url}/v1/caption", data) for key, data in images.items()}
        assert ask(f"{url}/v1/models")["models"][0]["scorer"] == fingerprint
    finally:
        stop()
    assert {key: (a["caption"], [c["caption"] for c in a["candidates"]]) for key, a in answers.items()} == here
    assert [answer["match"] for answer in answers.values()] == matches
    said = capsys.readouterr().out
    assert said.count(f"captions chosen by {door['scorer']} (unverified: no raycap.json vouches for it)") == 3
