"""raycap.Scorer: a folder of BlipForImageTextRetrieval, and an original retrieval checkpoint, give transformers' scores."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_blip_retrieval import retrieval_config
from test_originals import VOCAB_SIZE, drawn, scorer_shapes
from tiny import edit_json, png_images, write_bert_tokenizer
from tokenizers import Tokenizer
from transformers import BlipForImageTextRetrieval, BlipImageProcessorPil

from raycap import Captioner, Scorer
from raycap.checkpoint.imports import import_weights
from raycap.config import ImportConfig
from raycap.errors import CheckpointError, UserError
from raycap.text import TextSpec, role_ids, save_tokenizer, train_wordpiece

pytestmark = pytest.mark.filterwarnings("ignore:.*is unverified:UserWarning")
TOKENIZER = train_wordpiece(["two dogs and one red cat on the hill", "under a big blue kite"])
TEXTS = [["two dogs", "a red cat on the hill and two dogs under the kite"], ["blue"], [], ["a", "b", "a b " * 40]]


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, BlipForImageTextRetrieval]:
    return tmp_path / "published", write_scorer(tmp_path / "published")


def write_scorer(
    folder: Path, tokenizer: Tokenizer = TOKENIZER, size: int = 16, **processor: Any
) -> BlipForImageTextRetrieval:
    """A folder as transformers writes it, of its model; weights as wide as makes scores differ. size: of images, in pixels."""
    config = retrieval_config()
    config.text_config.vocab_size, config.text_config.max_position_embeddings = tokenizer.get_vocab_size(), 64
    config.vision_config.image_size = size
    torch.manual_seed(0)
    model = BlipForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name.lower() and "weight" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": size, "width": size}, **processor).save_pretrained(folder)
    bos_id, eos_id, pad_id = role_ids(tokenizer)
    spec = TextSpec(prompt="", bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, max_tokens=32)
    save_tokenizer(tokenizer, spec, str(folder))
    return model


def scores_of_transformers(
    folder: Path,
    model: BlipForImageTextRetrieval,
    image: bytes,
    text: str,
    tokenizer: Tokenizer = TOKENIZER,
    enc_id: int | None = TOKENIZER.token_to_id("[ENC]"),
) -> tuple[float, float]:
    """(match, cosine) of one text, as salesforce/BLIP and LAVIS compute them: [ENC] first where it is matched."""
    pixels = BlipImageProcessorPil.from_pretrained(folder)(
        Image.open(io.BytesIO(image)).convert("RGB"), return_tensors="pt"
    )
    words = tokenizer.encode(text, add_special_tokens=False).ids[:33]
    first, last = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    ids = torch.tensor([[first, *words, last]])
    with torch.no_grad():
        cosine = model(ids, **pixels, use_itm_head=False).itm_score
        ids[:, 0] = enc_id
        match = model(ids, **pixels, use_itm_head=True).itm_score.softmax(-1)[:, 1]
    return match.item(), cosine.item()


def test_scores_are_those_of_transformers_for_any_number_of_texts(
    published: tuple[Path, BlipForImageTextRetrieval],
) -> None:
    folder, model = published
    images = png_images(4)
    results = Scorer.load(folder).score(images, TEXTS, micro_batch_size=3)
    assert [len(result.match) for result in results] == [len(texts) for texts in TEXTS]
    seen = [pair for result in results for pair in zip(result.match, result.cosine, strict=True)]
    expected = [
        scores_of_transformers(folder, model, image, text)
        for image, texts in zip(images, TEXTS, strict=True)
        for text in texts
    ]
    np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-6)
    assert len({round(cosine, 4) for _, cosine in seen}) == len(seen)


def test_a_bad_image_is_a_result_and_spoils_no_other(published: tuple[Path, BlipForImageTextRetrieval]) -> None:
    scorer = Scorer.load(published[0])
    good = png_images(2)
    (first, bad, second) = scorer.score([good[0], b"<html>", good[1]], [["two dogs"]] * 3)
    assert (bad.match, bad.error_kind) == ((), "not_an_image")
    assert [first, second] == scorer.score(good, [["two dogs"]] * 2)
    assert [result.error_kind for result in scorer.score([b"", b"x"], [["a"], ["b"]])] == ["empty", "not_an_image"]


def test_wrong_calls_are_refused(published: tuple[Path, BlipForImageTextRetrieval]) -> None:
    scorer = Scorer.load(published[0])
    with pytest.raises(ValueError, match="there are 1 images and 2 lists of texts"):
        scorer.score(png_images(1), [["a"], ["b"]])
    with pytest.raises(TypeError, match="a text where a list of texts is expected"):
        scorer.score(png_images(1), ["a"])


def test_an_original_retrieval_checkpoint_becomes_a_folder_for_us_and_for_transformers(tmp_path: Path) -> None:
    torch.save({"model": drawn(scorer_shapes(), 3)}, tmp_path / "retrieval.pth")
    tokenizer = write_bert_tokenizer(tmp_path / "tokenizer", VOCAB_SIZE - 2)
    given: Any = {"weights": str(tmp_path / "retrieval.pth"), "out": str(tmp_path / "out")}
    said: list[str] = []
    import_weights(ImportConfig(**given, tokenizer=str(tmp_path / "tokenizer")), said.append)
    assert "is a pickled file" in said[0]
    assert "it captions nothing" in said[-1]
    model, report = BlipForImageTextRetrieval.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    image = png_images(1)[0]
    (result,) = Scorer.load(tmp_path / "out").score([image], [["a b"]])
    expected = scores_of_transformers(tmp_path / "out", model.eval(), image, "a b", tokenizer, VOCAB_SIZE - 1)
    assert (*result.match, *result.cosine) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(CheckpointError, match=r"captions nothing; open it with raycap\.Scorer"):
        Captioner.load(tmp_path / "out")
    with pytest.raises(UserError, match=r"is not empty \(it holds 'config\.json'\)"):
        import_weights(ImportConfig(**given, tokenizer=str(tmp_path / "tokenizer")), said.append)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(architectures=["BlipForConditionalGeneration"]), "a scorer is a BlipForImageTextRetrieval"),
        (lambda c: c.update(architectures=5), "is of 5; a scorer is a BlipForImageTextRetrieval"),
        (lambda c: c["text_config"].update(vocab_size=9), "more than the 9 tokens of the model"),
        (
            lambda c: c["text_config"].update(num_hidden_layers=1),
            r"do not fit its config\.json: 0 missing, \d+ unknown",
        ),
        (lambda c: c["vision_config"].update(image_size=64), "images of 16 pixels for a tower of 64"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    published: tuple[Path, BlipForImageTextRetrieval], change: Any, sentence: str
) -> None:
    edit_json(published[0] / "config.json", change)
    with pytest.raises(CheckpointError, match=sentence):
        Scorer.load(published[0])


def test_the_readmes_snippet_prints_scores(
    published: tuple[Path, BlipForImageTextRetrieval], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (Path(__file__).parents[2] / "README.md").read_text().partition("## Four families")[2]
    (snippet,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.S)
    (tmp_path / "photo.png").write_bytes(png_images(1)[0])
    snippet = snippet.replace("Salesforce/blip-itm-base-coco", str(published[0]))
    exec(snippet.replace("photo.jpg", str(tmp_path / "photo.png")))
    matches = capsys.readouterr().out
    assert re.fullmatch(r"\(0\.\d+, 0\.\d+\) \(-?0\.\d+, -?0\.\d+\) None\n", matches), matches
