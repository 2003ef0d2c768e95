"""A scorer chooses the caption: transformers' BlipForImageTextRetrieval says the same order, in any batch and through every door."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from test_bulk import job, make_manifest, make_units, pool, write_images  # noqa: F401  # fixtures among them
from test_scorer import write_scorer
from test_serving_http import PNG, SERVED, Told, app, ask
from tiny import assert_same_results, edit_json, png_images, tiny_checkpoint
from tokenizers import Tokenizer
from transformers import BlipForImageTextRetrieval

from raycap import storage
from raycap.bulk import caption as bulk
from raycap.bulk import plan, verify
from raycap.captioner import Captioner, check_finite
from raycap.checkpoint import export_weights, open_spec, save_checkpoint
from raycap.checkpoint.retrieval import open_scorer_spec
from raycap.config import CaptionBucketConfig, EvaluateConfig, ServeConfig
from raycap.decode_pool import DecodePool
from raycap.errors import CheckpointError, StorageError, UserError
from raycap.evaluation.evaluate import evaluate
from raycap.image import decode_image, prepare_image
from raycap.report.read import read_report
from raycap.schema import Candidate, CaptionResult, DecodeSettings, ImageSpec
from raycap.scorer import Scorer, Scores, check_geometry, scorer_fingerprint
from raycap.serving.app import decode_settings
from raycap.serving.run import start

pytestmark = pytest.mark.filterwarnings("ignore:.*is unverified:UserWarning")
torch.set_num_threads(1)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)  # the scorer's own
BEAMS = DecodeSettings(max_new_tokens=10, num_beams=4, num_candidates=4)
DRAWS = DecodeSettings(max_new_tokens=10, do_sample=True, top_k=20, num_candidates=6)
BOTH = pytest.mark.parametrize("settings", [BEAMS, DRAWS], ids=["beams", "draws"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint and a scorer for images of the same size, which they normalise differently."""
    root = tmp_path_factory.mktemp("rescore")
    spec, model, _ = tiny_checkpoint(seed=3)
    save_checkpoint(f"{root}/checkpoint", export_weights(model), spec, {"step": 0})
    write_scorer(root / "scorer", spec.tokenizer, 32, image_mean=MEAN, image_std=STD)
    return {"checkpoint": f"{root}/checkpoint", "scorer": f"{root}/scorer"}


@pytest.fixture(scope="module")
def plain(folders: dict[str, str]) -> Captioner:
    return Captioner.load(folders["checkpoint"])


@pytest.fixture(scope="module")
def captioner(folders: dict[str, str]) -> Captioner:
    with pytest.warns(UserWarning, match="scorer' is unverified: no raycap.json vouches for its files"):
        return Captioner.load(folders["checkpoint"], scorer=folders["scorer"])


def pixels_of(images: list[bytes]) -> npt.NDArray[np.uint8]:
    return np.stack([prepare_image(decode_image(image), ImageSpec(size=32)) for image in images])


def restated(
    model: BlipForImageTextRetrieval, tokenizer: Tokenizer, result: CaptionResult, pixels: npt.NDArray[np.uint8]
) -> list[Candidate]:
    """All candidates of a search as transformers orders them, one text at a time, [ENC] first."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixel_values = (torch.tensor(pixels)[None] / 255 - mean) / std
    matched = []
    for candidate in result.candidates:
        words = tokenizer.encode(candidate.caption, add_special_tokens=False).ids
        ids = torch.tensor([[tokenizer.token_to_id("[ENC]"), *words, tokenizer.token_to_id("[SEP]")]])
        with torch.no_grad():
            logits = model(ids, pixel_values, use_itm_head=True).itm_score
        matched.append(candidate._replace(match=logits.softmax(-1)[0, 1].item()))
    return sorted(matched, key=lambda candidate: candidate.match or 0, reverse=True)


@BOTH
def test_candidates_come_by_the_match_that_transformers_gives_and_the_best_is_the_caption(
    captioner: Captioner, plain: Captioner, folders: dict[str, str], settings: DecodeSettings
) -> None:
    images = png_images(10)
    found = plain.caption(images, settings)
    results = captioner.caption(images, settings)
    model = BlipForImageTextRetrieval.from_pretrained(folders["scorer"]).eval()
    for result, before, pixels in zip(results, found, pixels_of(images), strict=True):
        expected = restated(model, plain.spec.tokenizer, before, pixels)
        assert len(expected) == settings.num_candidates
        assert [c.match for c in result.candidates] == pytest.approx([c.match for c in expected], abs=1e-5)
        assert [c[:3] for c in result.candidates] == [c[:3] for c in expected]
        assert result.candidates[0] == (result.caption, result.score, result.log_prob, result.match)
        assert all(c.match is None for c in before.candidates)
    assert sum(a.caption != b.caption for a, b in zip(results, found, strict=True)) > 3


def test_candidates_are_cut_after_they_were_ordered(captioner: Captioner) -> None:
    images = png_images(6)
    full = captioner.caption(images, BEAMS)
    for num_candidates in (0, 1, 3):
        cut = captioner.caption(images, replace(BEAMS, num_candidates=num_candidates))
        assert cut == [replace(result, candidates=result.candidates[:num_candidates]) for result in full]


@BOTH
def test_an_image_has_the_same_choice_in_any_batch(captioner: Captioner, settings: DecodeSettings) -> None:
    images = png_images(12)
    together = captioner.caption(images, settings)
    for size in (1, 5):
        apart = captioner.caption(images, settings, micro_batch_size=size)
        assert [[c.caption for c in r.candidates] for r in apart] == [
            [c.caption for c in r.candidates] for r in together
        ]
        assert [r.match for r in apart] == pytest.approx([r.match for r in together], abs=1e-5)
    prompts = ["", "a picture of "] * 6
    prompted = captioner.caption(images, settings, prompts=prompts)
    assert [r.caption for r in prompted[::2]] == [r.caption for r in together[::2]]
    (alone,) = captioner.caption(images[1:2], settings, prompts=prompts[1:2])
    assert (prompted[1].caption, prompted[1].match) == (alone.caption, pytest.approx(alone.match, abs=1e-5))


def test_equal_matches_keep_the_order_of_the_search(folders: dict[str, str], plain: Captioner) -> None:
    captioner = Captioner.load(folders["checkpoint"], scorer=folders["scorer"])
    assert captioner.scorer is not None
    images = png_images(6)
    for result in captioner.caption(images, replace(DRAWS, temperature=0.2, num_candidates=20)):
        assert (
            len({(c.caption, c.match) for c in result.candidates}) == len({c.caption for c in result.candidates}) < 20
        )
    with torch.no_grad():
        captioner.scorer.model.itm_head.weight.zero_()
        captioner.scorer.model.itm_head.bias.zero_()
    found = plain.caption(images, BEAMS)
    expected = [tuple(c._replace(match=0.5) for c in result.candidates) for result in found]
    assert [result.candidates for result in captioner.caption(images, BEAMS)] == expected


def test_bf16_is_for_the_captioner_alone(captioner: Captioner, folders: dict[str, str]) -> None:
    half = Captioner.load(folders["checkpoint"], scorer=folders["scorer"], dtype="bf16")
    images = png_images(4)
    for pixels, result in zip(pixels_of(images), half.caption(images, BEAMS), strict=True):
        assert captioner.scorer is not None
        (scores,) = captioner.scorer.score_prepared(pixels[None], [[c.caption for c in result.candidates]])
        assert [c.match for c in result.candidates] == pytest.approx(scores.match, abs=1e-6)


# ---- images and probabilities that are not as they should be


def test_a_match_that_is_no_number_is_an_error_of_its_image_alone(folders: dict[str, str]) -> None:
    captioner = Captioner.load(folders["checkpoint"], scorer=folders["scorer"])
    images = png_images(3)
    before = captioner.caption(images, BEAMS)

    class Spoilt(Scorer):
        def score_prepared(self, pixel_values: Any, texts: Any, **options: bool) -> list[Scores]:
            first, *others = super().score_prepared(pixel_values, texts, **options)
            return [Scores(match=(*first.match[:-1], float("nan"))), *others]

    assert captioner.scorer is not None
    captioner.scorer = Spoilt(captioner.scorer.model, captioner.scorer.spec)
    first, *others = captioner.caption(images, BEAMS)
    assert (first.caption, first.match, first.candidates, first.error_kind) == (None, None, (), "not_finite")
    assert first.error is not None
    assert first.error.startswith("the scorer's probabilities for this image are infinite or NaN")
    assert others == before[1:]
    with torch.no_grad():
        captioner.scorer.model.itm_head.bias[0] = torch.nan
    kinds = [result.error_kind for result in captioner.caption(images, BEAMS)]
    assert kinds == ["not_finite"] * 3
    with pytest.raises(CheckpointError, match="or those of its scorer, are broken"):
        check_finite(kinds)


def test_images_without_a_caption_are_left_as_they_are(folders: dict[str, str]) -> None:
    captioner = Captioner.load(folders["checkpoint"], scorer=folders["scorer"])
    images = png_images(3)
    good = captioner.caption(images, BEAMS)
    assert_same_results(captioner.caption([images[0], b"<html>", images[1]], BEAMS)[::2], good[:2])
    with torch.no_grad():
        captioner.model.vision_model.get_parameter("post_layernorm.bias")[0] = torch.inf
    results = captioner.caption(images, BEAMS)
    assert [(r.caption, r.error_kind, r.candidates) for r in results] == [(None, "not_finite", ())] * 3
    assert all(str(r.error).startswith("the model's probabilities") for r in results)


def test_a_draw_without_finite_probability_is_never_the_caption(captioner: Captioner) -> None:
    assert captioner.scorer is not None
    texts = ["two dogs", "a red cat", "a kite"]
    pixels = pixels_of(png_images(1))
    (scores,) = captioner.scorer.score_prepared(pixels, [texts])
    best = int(np.argmax(scores.match))
    found = [Candidate(text, float("nan") if i == best else -1.0, -2.0) for i, text in enumerate(texts)]
    result = CaptionResult(caption=texts[0], score=-1.0, log_prob=-2.0, candidates=tuple(found))
    (chosen,) = captioner.scorer.choose(pixels, [result], 3)
    assert chosen.candidates[-1].caption == texts[best] != chosen.caption


def test_a_scorer_for_which_memory_lacks_halves_the_batch(folders: dict[str, str]) -> None:
    captioner = Captioner.load(folders["checkpoint"], scorer=folders["scorer"])
    images = png_images(7)
    expected = captioner.caption(images, BEAMS)
    sizes: list[int] = []

    class Narrow(Scorer):
        def score_prepared(self, pixel_values: Any, texts: Any, **options: bool) -> list[Scores]:
            sizes.append(len(pixel_values))
            if len(pixel_values) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().score_prepared(pixel_values, texts, **options)

    assert captioner.scorer is not None
    captioner.scorer = Narrow(captioner.scorer.model, captioner.scorer.spec)
    with pytest.warns(UserWarning, match="images do not fit into the memory"):
        results = captioner.caption(images, BEAMS)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert [result.caption for result in results] == [result.caption for result in expected]


# ---- what is refused


OTHERS = [
    (ImageSpec(size=64), "size=32", "size=64"),
    (ImageSpec(size=32, fit="crop"), "fit='squash'", "fit='crop'"),
    (ImageSpec(size=32, resample="bilinear"), "resample='bicubic'", "resample='bilinear'"),
    (ImageSpec(size=32, fit="crop", shorter_side=40), "fit='squash', shorter_side=0", "fit='crop', shorter_side=40"),
]


@pytest.mark.parametrize(("image", "ours", "theirs"), OTHERS)
def test_a_scorer_of_another_geometry_is_refused_with_both_folders_and_values(
    image: ImageSpec, ours: str, theirs: str
) -> None:
    check_geometry(ImageSpec(size=32, mean=MEAN, std=STD, decode="fast"), "/scorer", ImageSpec(size=32), "/checkpoint")
    crop = ImageSpec(size=32, fit="crop")
    check_geometry(crop, "/scorer", replace(crop, shorter_side=32), "/checkpoint")
    with pytest.raises(UserError, match="give two that prepare images alike") as caught:
        check_geometry(image, "/scorer", ImageSpec(size=32), "/checkpoint")
    assert f"checkpoint '/checkpoint' prepares images with {ours} and scorer '/scorer' with {theirs}," in str(
        caught.value
    )


def test_a_scorer_of_another_geometry_is_refused_when_it_is_loaded(folders: dict[str, str], tmp_path: Path) -> None:
    write_scorer(tmp_path / "small", size=16)
    for load in (
        lambda: Captioner.load(folders["checkpoint"], scorer=tmp_path / "small"),
        lambda: bulk.caption_bucket(bucket_config(folders, tmp_path, scorer=f"{tmp_path}/small")),
        lambda: evaluate(
            EvaluateConfig(checkpoint=folders["checkpoint"], shards="/x", scorer=f"{tmp_path}/small", num_beams=2)
        ),
        lambda: start(ServeConfig(checkpoint=folders["checkpoint"], scorer=f"{tmp_path}/small", num_beams=2)),
    ):
        with pytest.raises(UserError, match=r"with size=32 and scorer '.*/small' with size=16,"):
            load()
    assert not Path(tmp_path, "out").exists()
    with pytest.raises(CheckpointError, match="a scorer is a BlipForImageTextRetrieval"):
        Captioner.load(folders["checkpoint"], scorer=folders["checkpoint"])


def test_pixels_of_another_shape_or_without_texts_are_refused(captioner: Captioner) -> None:
    assert captioner.scorer is not None
    for pixels, texts in (
        (np.zeros((1, 3, 16, 16), np.uint8), [["a"]]),
        (np.zeros((1, 3, 32, 32), np.float32), [["a"]]),
        (np.zeros((2, 3, 32, 32), np.uint8), [["a"]]),
    ):
        with pytest.raises(ValueError, match=r"not uint8 \(images, 3, 32, 32\) with a list for each; prepare images"):
            captioner.scorer.score_prepared(pixels, texts)
    assert captioner.scorer.score_prepared(np.zeros((1, 3, 32, 32), np.uint8), [[]]) == [Scores()]


SINGLE = [
    ({}, "num_beams is 1, which finds a single caption, and a scorer chooses from several; give num_beams of 2 or"),
    ({"num_candidates": 1}, "num_beams is 1"),
    (
        {"do_sample": True},
        "num_candidates is 0 with do_sample, which draws a single caption, .* give num_candidates of 2",
    ),
    ({"do_sample": True, "num_candidates": 1}, "num_candidates is 1 with do_sample"),
]


@pytest.mark.parametrize(("given", "sentence"), SINGLE)
def test_a_search_that_finds_a_single_caption_is_refused_at_every_door_before_any_work(
    captioner: Captioner, folders: dict[str, str], tmp_path: Path, given: dict[str, Any], sentence: str
) -> None:
    settings = DecodeSettings(max_new_tokens=5, **given)
    door: dict[str, Any] = {"checkpoint": folders["checkpoint"], "scorer": folders["scorer"]}
    door["decode_settings"] = json.dumps(given) if given else ""
    calls: list[Callable[[], object]] = [
        lambda: captioner.check(settings),
        lambda: captioner.caption([b"no image"], settings),
        lambda: captioner.caption_prepared(np.zeros((0, 3, 32, 32), np.uint8), settings),
        lambda: bulk.caption_bucket(CaptionBucketConfig(**door, images=str(tmp_path), out=f"{tmp_path}/out")),
        lambda: evaluate(EvaluateConfig(**door, shards=f"{tmp_path}/nowhere", out=f"{tmp_path}/out")),
        lambda: decode_settings(ServeConfig(**door), captioner.spec),
        lambda: start(ServeConfig(**door)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=sentence):
            call()
    assert not Path(tmp_path, "out").exists()


# ---- the scorer's fingerprint


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_the_fingerprint_is_that_of_every_file_that_is_read(name: str, tmp_path: Path) -> None:
    write_scorer(tmp_path / "one")
    write_scorer(tmp_path / "two")
    one, two = (open_scorer_spec(f"{tmp_path}/{folder}").fingerprint for folder in ("one", "two"))
    assert one == two == Scorer.load(tmp_path / "one").fingerprint
    assert len(one) == 64
    file = tmp_path / "one" / name
    if name == "model.safetensors":
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(data)
    else:
        file.write_text(file.read_text() + "\n")
    assert open_scorer_spec(f"{tmp_path}/one").fingerprint != one
    assert scorer_fingerprint("", ImageSpec(size=16), "/checkpoint") == ""


def bucket_config(folders: dict[str, str], root: Path, **options: Any) -> CaptionBucketConfig:
    (root / "images").mkdir(exist_ok=True)
    (root / "images" / "a.png").write_bytes(PNG)
    given = {"checkpoint": folders["checkpoint"], "scorer": folders["scorer"], "num_beams": 3} | options
    return CaptionBucketConfig(images=f"{root}/images", out=f"{root}/out", **given)


def test_the_plan_of_a_bulk_run_names_the_scorer_only_where_there_is_one(
    folders: dict[str, str], tmp_path: Path
) -> None:
    spec = open_spec(folders["checkpoint"])
    config = bucket_config(folders, tmp_path)
    without = replace(config, scorer="")
    begun = plan.make_plan(config, config.images, spec, "fp32", "5c03e3")
    assert begun == plan.make_plan(without, config.images, spec, "fp32") | {"scorer": "5c03e3"}
    ids = [
        plan.make_job(given, config.images, spec, "fp32", scorer).settings_id
        for given, scorer in ((config, "5c03e3"), (config, "07e3"), (without, ""))
    ]
    assert len(set(ids)) == 3


def test_an_output_begun_with_another_scorer_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    spec, config = open_spec(folders["checkpoint"]), bucket_config(folders, tmp_path)
    fingerprint = scorer_fingerprint(folders["scorer"], spec.image, folders["checkpoint"])
    begun = plan.make_plan(config, config.images, spec, "fp32", fingerprint)
    storage.put(f"{config.out}/job.json", (json.dumps(begun, indent=1, sort_keys=True) + "\n").encode())
    with pytest.raises(StorageError, match=rf"begun with scorer='{fingerprint}' and this command has scorer=None;"):
        bulk.caption_bucket(replace(config, scorer=""))
    write_scorer(tmp_path / "other", spec.tokenizer, 32)
    with pytest.raises(StorageError, match=rf"begun with scorer='{fingerprint}' and this command has scorer='"):
        bulk.caption_bucket(replace(config, scorer=f"{tmp_path}/other"))
    summary = verify.seal(plan.make_job(config, config.images, spec, "fp32", fingerprint), 1, Counter(), 1.0)
    assert bulk.caption_bucket(config) == summary


def test_a_scorer_that_was_replaced_while_it_was_used_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    spec = open_spec(folders["checkpoint"])
    scorer = str(tmp_path / "scorer")
    write_scorer(Path(scorer), spec.tokenizer, 32)
    fingerprint = scorer_fingerprint(scorer, spec.image, folders["checkpoint"])
    arguments: Any = (folders["checkpoint"], spec.fingerprint, "cpu", "fp32", "", scorer, fingerprint)
    loaded = bulk.load_captioner(*arguments)
    assert loaded.scorer is not None
    assert loaded.scorer.fingerprint == fingerprint
    edit_json(tmp_path / "scorer" / "preprocessor_config.json", lambda image: image.update(image_mean=[0.5, 0.5, 0.5]))
    with pytest.raises(
        CheckpointError, match=rf"scorer '{scorer}' was replaced while it was used: .* not '{fingerprint}'"
    ):
        bulk.load_captioner(*arguments)


# ---- the doors' answers


def test_bulk_rows_say_the_match(
    captioner: Captioner,
    job: plan.Job,  # noqa: F811
    pool: DecodePool,  # noqa: F811
) -> None:
    job = replace(job, settings=replace(BEAMS, num_candidates=2))
    names = write_images(job, 6)
    storage.put(f"{job.images}/z.png", b"<html>")
    rows = make_units(job, make_manifest(job), pool, captioner)
    expected = captioner.caption([storage.read_bytes(f"{job.images}/{name}") for name in names], job.settings)
    assert [row["caption"] for row in rows[:-1]] == [result.caption for result in expected]
    assert [row["match"] for row in rows[:-1]] == pytest.approx([result.match for result in expected], abs=1e-5)
    for row, result in zip(rows, expected, strict=False):
        assert [c["caption"] for c in row["candidates"]] == [c.caption for c in result.candidates]
        assert [c["match"] for c in row["candidates"]] == pytest.approx([c.match for c in result.candidates], abs=1e-5)
    assert (rows[-1]["match"], rows[-1]["error_kind"]) == (None, "not_an_image")
    assert str(pq.read_schema(job.unit_url(0)).field("match").type) == "float"


class Matched(Told):
    """A captioner with a scorer."""

    async def served(self) -> Any:
        return replace(SERVED, scorer="5" * 64, decode=replace(SERVED.decode, num_beams=3))

    async def caption(self, pixels: Any, settings: DecodeSettings) -> tuple[CaptionResult, str, bool]:  # noqa: ARG002
        best = Candidate("a", -2.0, -4.0, 0.75)
        return (
            CaptionResult(**best._asdict(), candidates=(best, Candidate("b", -1.0, -2.0, 0.5))),
            SERVED.fingerprint,
            True,
        )


def test_the_endpoint_answers_the_match_and_tells_its_scorer() -> None:
    answer = ask(app(Matched()), body=[PNG])
    assert (answer.status, answer.json["caption"], answer.json["match"]) == (200, "a", 0.75)
    assert [candidate["match"] for candidate in answer.json["candidates"]] == [0.75, 0.5]
    for model, scorer in ((Matched(), "5" * 64), (Told(), None)):
        (told,) = ask(app(model), method="GET", path="/v1/models").json["models"]
        assert told["scorer"] == scorer


def test_a_request_that_leaves_the_scorer_no_choice_is_refused() -> None:
    answer = ask(app(Matched()), body=[PNG], query=b"num_beams=1")
    assert (answer.status, answer.error_kind) == (400, "bad_request")
    assert "num_beams is 1, which finds a single caption" in answer.json["error"]
    assert ask(app(Matched()), body=[PNG], query=b"num_beams=2").status == 200


def test_the_report_names_the_scorer(tmp_path: Path) -> None:
    about = {"metrics": {"cider": 1.0}, "checkpoint": "/c", "scorer": "/itm", "scorer_fingerprint": "5c03e3"}
    (tmp_path / "metrics.json").write_text(json.dumps(about))
    report = read_report(str(tmp_path))
    assert ("Chosen by", "/itm") in report.facts
    assert report.settings["Evaluation"]["scorer_fingerprint"] == "5c03e3"
