"""Tiny models for tests: BLIP's structure and token roles at a size that trains in milliseconds."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

from raycap.checkpoint import CheckpointSpec
from raycap.models.blip import Blip
from raycap.schema import CaptionResult, DecodeSettings, ImageSpec
from raycap.text import TextSpec, save_tokenizer, text_spec, train_wordpiece

PAD_ID, EOS_ID = 0, 3


def assert_same_results(got: list[CaptionResult], expected: list[CaptionResult]) -> None:
    """Captions and errors to the letter; scores but for rounding."""
    scores = [[r.score, r.log_prob, r.match, *(score for c in r.candidates for score in c[1:])] for r in expected]
    assert [[r.score, r.log_prob, r.match, *(score for c in r.candidates for score in c[1:])] for r in got] == [
        pytest.approx(of_image, abs=1e-4) for of_image in scores
    ]
    words = [(r.caption, [c.caption for c in r.candidates], r.error_kind, r.error) for r in expected]
    assert [(r.caption, [c.caption for c in r.candidates], r.error_kind, r.error) for r in got] == words


def tiny_blip_config(*, vocab_size: int = 60, label_smoothing: float = 0.0) -> BlipConfig:
    """BLIP's roles: pad 0, end = sep, [DEC] = bos = vocab_size - 2, [ENC] = vocab_size - 1."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **size,
        "encoder_hidden_size": 32,
        "vocab_size": vocab_size,
        "max_position_embeddings": 64,
        "pad_token_id": PAD_ID,
        "sep_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": vocab_size - 2,
        "label_smoothing": label_smoothing,
    }
    # transformers' default for the vision tower is 1e-10: fresh weights that see nothing
    vision = {**size, "image_size": 32, "patch_size": 8, "initializer_range": 0.02}
    return BlipConfig(text_config=text, vision_config=vision)


def tiny_blip_pair(
    *, seed: int = 0, vocab_size: int = 60, label_smoothing: float = 0.0
) -> tuple[Blip, BlipForConditionalGeneration]:
    """Ours and transformers' BLIP in eval mode with the same weights, all of them (norms and biases too) far from 0."""
    config = tiny_blip_config(vocab_size=vocab_size, label_smoothing=label_smoothing)
    published = BlipForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in published.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name.lower() and "weight" in name else 0.2 * noise)
    ours = Blip(config).eval()
    ours.load_state_dict(published.state_dict())
    return ours, published


def tiny_checkpoint(*, seed: int = 0, prompt: str = "") -> tuple[CheckpointSpec, Blip, BlipForConditionalGeneration]:
    """A spec with a real tokenizer, and the pair of models it describes; they end captions after a few words."""
    tokenizer = train_wordpiece(["a picture of two dogs and one red cat on the hill", "under a big blue kite, then"])
    ours, published = tiny_blip_pair(seed=seed, vocab_size=tokenizer.get_vocab_size())
    with torch.no_grad():  # random weights rarely end a caption by themselves
        ours.text_decoder.get_parameter("cls.predictions.bias")[EOS_ID] += 2.0
    published.load_state_dict(ours.state_dict())
    spec = CheckpointSpec(
        kind="blip",
        model_config=published.config.to_dict(),
        tokenizer=tokenizer,
        text=text_spec(tokenizer, prompt=prompt),
        image=ImageSpec(size=32),
        decode=DecodeSettings(max_new_tokens=12),
    )
    return spec, ours, published


def png_images(count: int) -> list[bytes]:
    """Encoded images of different sizes, none like another."""
    rng = np.random.default_rng(7)
    encoded = []
    for n in range(count):
        # Few large fields: noise would look the same to the model after resizing.
        fields = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
        buffer = io.BytesIO()
        fields.resize((40 + 3 * n, 50 - n), Image.Resampling.NEAREST).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def write_published(folder: Path) -> None:
    """A folder as Salesforce published BLIP: BERT's tokenizer, to which [DEC] and [ENC] are unknown; no raycap.json."""
    folder.mkdir()
    spec, _, model = tiny_checkpoint()
    model.save_pretrained(folder)
    # Salesforce's text_config names 2 as the end, which nothing uses; captions end with [SEP].
    edit_json(folder / "config.json", lambda config: config["text_config"].update(eos_token_id=2))
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    document = json.loads(spec.tokenizer.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] not in ("[DEC]", "[ENC]")]
    document["model"]["vocab"] = {k: v for k, v in document["model"]["vocab"].items() if k not in ("[DEC]", "[ENC]")}
    save_tokenizer(Tokenizer.from_str(json.dumps(document)), spec.text, str(folder))
    (folder / "generation_config.json").unlink()


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def captions_by_transformers(folder: Path, images: list[bytes], prompt: str, max_new_tokens: int = 12) -> list[str]:
    """Greedy captions of a folder by plain transformers, without the prompt."""
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    pictures = [Image.open(io.BytesIO(data)) for data in images]
    text = {"text": [prompt] * len(images)} if prompt else {}
    inputs = processor(images=pictures, return_tensors="pt", **text)
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=1, do_sample=False)
    texts = processor.batch_decode(generated, skip_special_tokens=True)
    return [text.removeprefix(prompt.strip()).strip() for text in texts]


def write_bert_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """A folder of a tokenizer with the places that bert-base-uncased has for its own tokens, and letters behind them."""
    own = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    words = {i: f"[unused{i}]" if i < 104 else chr(ord("a") + i - 104) for i in range(vocab_size)} | own
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in words.items()}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(own.values()))
    folder.mkdir()
    spec = TextSpec(prompt="", bos_id=101, eos_id=102, pad_id=0, max_tokens=512)
    save_tokenizer(tokenizer, spec, str(folder))
    return tokenizer
