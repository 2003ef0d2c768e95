"""raycap/checkpoint/originals.py: the research code's own files become models that compute what it computed; no pickle runs."""

import os
import pickle
import re
import resource
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from raycap.checkpoint.originals import blip_from_salesforce, read_pickled, retrieval_from_salesforce
from raycap.checkpoint.spec import CheckpointSpec
from raycap.checkpoint.weights import load_model, read_weights
from raycap.errors import CheckpointError
from raycap.models.blip import TIED_NAMES, Blip
from raycap.models.blip_retrieval import BlipRetrieval
from raycap.schema import DecodeSettings, ImageSpec
from raycap.text import TextSpec, train_wordpiece

torch.set_num_threads(1)

# A vision tower of 2 heads and a text transformer of 3; no two sizes are equal, so that nothing fits by chance.
E, E_MLP, D, D_MLP, W = 128, 160, 192, 224, 24
VOCAB_SIZE, NUM_POSITIONS, PATCH, GRID, BLOCKS, LAYERS = 120, 20, 4, 3, 2, 3
IMAGE_SIZE = GRID * PATCH
pytestmark = pytest.mark.filterwarnings("ignore:.* is a pickled file")


# ---- The layout of github.com/salesforce/BLIP, written down from models/vit.py, med.py, blip.py and blip_retrieval.py.


def with_bias(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def vit_shapes(
    name: str, width: int = E, mlp: int = E_MLP, depth: int = BLOCKS, patch: int = PATCH, grid: int = GRID
) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.cls_token": (1, 1, width), f"{name}.pos_embed": (1, 1 + grid**2, width)}
    shapes |= with_bias(f"{name}.patch_embed.proj", width, 3, patch, patch)
    for n in range(depth):
        shapes |= with_bias(f"{name}.blocks.{n}.norm1", width)
        shapes |= with_bias(f"{name}.blocks.{n}.attn.qkv", 3 * width, width)
        shapes |= with_bias(f"{name}.blocks.{n}.attn.proj", width, width)
        shapes |= with_bias(f"{name}.blocks.{n}.norm2", width)
        shapes |= with_bias(f"{name}.blocks.{n}.mlp.fc1", mlp, width)
        shapes |= with_bias(f"{name}.blocks.{n}.mlp.fc2", width, mlp)
    return shapes | with_bias(f"{name}.norm", width)


def bert_shapes(
    name: str,
    width: int = D,
    mlp: int = D_MLP,
    depth: int = LAYERS,
    vocab: int = VOCAB_SIZE,
    positions: int = NUM_POSITIONS,
    image_width: int = E,
) -> dict[str, tuple[int, ...]]:
    shapes = {
        f"{name}.embeddings.position_ids": (1, positions),
        f"{name}.embeddings.word_embeddings.weight": (vocab, width),
        f"{name}.embeddings.position_embeddings.weight": (positions, width),
    }
    shapes |= with_bias(f"{name}.embeddings.LayerNorm", width)
    for n in range(depth):
        layer = f"{name}.encoder.layer.{n}"
        for block, source in (("attention", width), ("crossattention", image_width)):
            shapes |= with_bias(f"{layer}.{block}.self.query", width, width)
            shapes |= with_bias(f"{layer}.{block}.self.key", width, source)
            shapes |= with_bias(f"{layer}.{block}.self.value", width, source)
            shapes |= with_bias(f"{layer}.{block}.output.dense", width, width)
            shapes |= with_bias(f"{layer}.{block}.output.LayerNorm", width)
        shapes |= with_bias(f"{layer}.intermediate.dense", mlp, width)
        shapes |= with_bias(f"{layer}.output.dense", width, mlp)
        shapes |= with_bias(f"{layer}.output.LayerNorm", width)
    return shapes


def head_shapes(width: int = D, vocab: int = VOCAB_SIZE) -> dict[str, tuple[int, ...]]:
    name = "text_decoder.cls.predictions"
    shapes = with_bias(f"{name}.transform.dense", width, width) | with_bias(f"{name}.transform.LayerNorm", width)
    return shapes | {f"{name}.bias": (vocab,), **with_bias(f"{name}.decoder", vocab, width)}


def captioner_shapes() -> dict[str, tuple[int, ...]]:
    return vit_shapes("visual_encoder") | bert_shapes("text_decoder.bert") | head_shapes()


def scorer_shapes() -> dict[str, tuple[int, ...]]:
    shapes = vit_shapes("visual_encoder") | bert_shapes("text_encoder")
    shapes |= with_bias("vision_proj", W, E) | with_bias("text_proj", W, D)
    return shapes | with_bias("itm_head", 2, D)


def beside_shapes() -> dict[str, tuple[int, ...]]:
    """What training with momentum and queues of negatives adds."""
    shapes = vit_shapes("visual_encoder_m") | bert_shapes("text_encoder_m")
    shapes |= with_bias("vision_proj_m", W, E) | with_bias("text_proj_m", W, D)
    return shapes | {"image_queue": (W, 8), "text_queue": (W, 8), "queue_ptr": (1,), "temp": ()}


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights, all far from their usual start; buffers as BLIP registers them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        scale = 0.3 if len(shape) < 2 else 1.2 * shape[-1] ** -0.5
        state[name] = 1 + 0.2 * noise if "norm" in name.lower() and name.endswith("weight") else scale * noise
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[1])[None]
        elif "ptr" in name or "idx" in name:
            state[name] = torch.zeros(shape, dtype=torch.long)
    return state


def captioner_state(seed: int = 0) -> dict[str, Tensor]:
    """As BLIP_Decoder's state_dict(), in which the output layer is tied."""
    state = drawn(captioner_shapes(), seed)
    predictions = "text_decoder.cls.predictions"
    state[f"{predictions}.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    state[f"{predictions}.decoder.bias"] = state[f"{predictions}.bias"]
    return state


def original_vision(state: dict[str, Tensor], pixels: Tensor, heads: int = 2) -> Tensor:
    """What VisionTransformer.forward of models/vit.py computes: pre-norm blocks, one linear layer for query, key, value."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"visual_encoder.{name}.weight"].T + state[f"visual_encoder.{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"visual_encoder.{name}.weight"] + state[f"visual_encoder.{name}.bias"]

    side = pixels.shape[-1] // PATCH
    patches = (
        pixels.reshape(len(pixels), 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    )
    embedded = patches @ state["visual_encoder.patch_embed.proj.weight"].flatten(1).T
    embedded = embedded + state["visual_encoder.patch_embed.proj.bias"]
    x = torch.cat([state["visual_encoder.cls_token"].expand(len(pixels), -1, -1), embedded], dim=1)
    x = x + state["visual_encoder.pos_embed"]
    for n in range(BLOCKS):
        mixed = []
        qkv = linear(f"blocks.{n}.attn.qkv", norm(f"blocks.{n}.norm1", x))
        width = E // heads
        for head in range(heads):
            q, k, v = (qkv[..., part * E + head * width :][..., :width] for part in range(3))
            mixed.append((q @ k.mT * width**-0.5).softmax(-1) @ v)
        x = x + linear(f"blocks.{n}.attn.proj", torch.cat(mixed, dim=-1))
        hidden = linear(f"blocks.{n}.mlp.fc1", norm(f"blocks.{n}.norm2", x))
        x = x + linear(f"blocks.{n}.mlp.fc2", hidden * 0.5 * (1 + torch.erf(hidden * 0.5**0.5)))
    return norm("norm", x)


def cubic_resized(picture: np.ndarray[Any, Any], new: int) -> np.ndarray[Any, Any]:
    """(S, S, E) -> (new, new, E) by Keys' cubic convolution with a = -0.75, which is what bicubic means in torch; pixel
    centres at half, edges repeated, no antialiasing.
    """

    def weight(t: float) -> float:
        t = abs(t)
        if t <= 1:
            return 1.25 * t**3 - 2.25 * t**2 + 1
        return -0.75 * t**3 + 3.75 * t**2 - 6 * t + 3 if t < 2 else 0.0

    old = len(picture)
    matrix = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            matrix[i, min(max(j, 0), old - 1)] += weight(at - j)
    return np.einsum("ij,jke,lk->ile", matrix, picture, matrix)


# ---- Conversion


def batch(image_size: int = IMAGE_SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    pixels = torch.randn(2, 3, image_size, image_size, generator=generator)
    return pixels, torch.randint(1, VOCAB_SIZE, (2, 7), generator=generator)


def captioner_pair(config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Blip, BlipForConditionalGeneration]:
    """Ours and transformers' captioner; no key may be missing but the second names of tied tensors, and none unexpected."""
    ours = Blip(BlipConfig.from_dict(config)).eval()
    published = BlipForConditionalGeneration(BlipConfig.from_dict(config)).eval()
    for model in (ours, published):
        result = model.load_state_dict(weights, strict=False)
        assert set(result.missing_keys) == set(TIED_NAMES)
        assert result.unexpected_keys == []
    return ours, published


def logits_of(ours: Blip, published: BlipForConditionalGeneration, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of our model, of transformers', and of transformers' text decoder behind the original's vision transformer."""
    pixels, ids = batch(ours.vision_model.embeddings.image_size)
    with torch.no_grad():
        image = ours.encode_image(pixels)
        torch.testing.assert_close(image.states_BTE, original_vision(state, pixels), rtol=0, atol=1e-5)
        by_ours = ours.text_decoder.cls(ours.text_decoder.bert(ids, image))
        by_published = published(pixel_values=pixels, input_ids=ids).logits
        original = published.text_decoder(ids, encoder_hidden_states=original_vision(state, pixels)).logits
    assert by_ours.std() > 0.1
    return by_ours, by_published, original


@pytest.mark.parametrize("below", ["model", "state_dict", None])
def test_a_captioner_in_the_original_layout_computes_what_the_original_did(tmp_path: Path, below: str | None) -> None:
    state = captioner_state()
    # Beside the weights, BLIP and LAVIS save what they resume by.
    saved = {below: state, "optimizer": {"state": {}, "lr": 0.1}, "config": {"vit": "base"}, "epoch": 4}
    torch.save(saved if below else state, tmp_path / "caption.pth")
    config, weights, dropped = blip_from_salesforce(read_pickled(tmp_path / "caption.pth"), "caption.pth")
    assert dropped == []
    ours, published = captioner_pair(config, weights)
    by_ours, by_published, original = logits_of(ours, published, state)
    torch.testing.assert_close(by_ours, by_published, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_ours, original, rtol=0, atol=1e-5)
    # In double precision not even an epsilon may differ.
    double, pixels = {name: tensor.double() for name, tensor in state.items()}, batch()[0].double()
    states = ours.double().encode_image(pixels).states_BTE
    torch.testing.assert_close(states, original_vision(double, pixels), rtol=0, atol=1e-10)


def test_an_imported_captioner_is_built_as_that_of_any_checkpoint() -> None:
    config, weights, _ = blip_from_salesforce(captioner_state(), "x", image_size=5 * PATCH)
    tokenizer = train_wordpiece(["two dogs and a kite"])
    spec = CheckpointSpec(
        kind="blip",
        model_config=config,
        tokenizer=tokenizer,
        text=TextSpec(prompt="", max_tokens=9, bos_id=VOCAB_SIZE - 2, eos_id=102, pad_id=0),
        image=ImageSpec(size=5 * PATCH),
        decode=DecodeSettings(max_new_tokens=9),
    )
    state = load_model(spec, weights, "x").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(("width", "depth", "heads"), [(768, 12, 12), (1024, 24, 16)])
def test_the_published_sizes_are_told_by_shapes_alone(width: int, depth: int, heads: int) -> None:
    shapes = vit_shapes("visual_encoder", width, 4 * width, depth, 16, 24)
    shapes |= bert_shapes("text_decoder.bert", 768, 3072, 12, 30524, 512, width) | head_shapes(768, 30524)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config, weights, _ = blip_from_salesforce(state, "x")
    vision, text = config["vision_config"], config["text_config"]
    assert (vision["image_size"], vision["patch_size"]) == (384, 16)
    assert (vision["hidden_size"], vision["num_hidden_layers"], vision["num_attention_heads"]) == (width, depth, heads)
    assert (text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]) == (768, 12, 12)
    assert (text["vocab_size"], text["max_position_embeddings"], text["encoder_hidden_size"]) == (30524, 512, width)
    assert [text[f"{role}_token_id"] for role in ("bos", "eos", "sep", "pad")] == [30522, 102, 102, 0]
    with torch.device("meta"):
        expected = BlipForConditionalGeneration(BlipConfig.from_dict(config)).state_dict()
    assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in expected.items() if n not in TIED_NAMES}


def test_a_width_that_is_no_multiple_of_64_needs_the_number_of_heads() -> None:
    shapes = vit_shapes("visual_encoder", 36) | bert_shapes("text_decoder.bert", image_width=36) | head_shapes()
    state = drawn(shapes)
    with pytest.raises(CheckpointError, match=r"vision tower of 'x' is 36 wide, .*; give vision_heads"):
        blip_from_salesforce(state, "x")
    with pytest.raises(CheckpointError, match=r"36 wide, which 5 heads do not divide .*; give vision_heads"):
        blip_from_salesforce(state, "x", vision_heads=5)
    config, _, _ = blip_from_salesforce(state, "x", vision_heads=4, text_heads=6)
    assert config["vision_config"]["num_attention_heads"] == 4
    assert config["text_config"]["num_attention_heads"] == 6
    narrow = vit_shapes("visual_encoder") | bert_shapes("text_decoder.bert", 20) | head_shapes(20)
    with pytest.raises(CheckpointError, match=r"text transformer of 'x' is 20 wide, .*; give text_heads"):
        blip_from_salesforce(drawn(narrow), "x")


@pytest.mark.parametrize("grid", [2, 5, 7])
def test_position_embeddings_are_resized_by_the_formula_and_the_class_token_is_kept(grid: int) -> None:
    state = captioner_state()
    config, weights, _ = blip_from_salesforce(state, "x", image_size=grid * PATCH)
    assert config["vision_config"]["image_size"] == grid * PATCH
    old = state["visual_encoder.pos_embed"]
    expected = cubic_resized(old[0, 1:].reshape(GRID, GRID, E).double().numpy(), grid).reshape(grid**2, E)
    resized = weights["vision_model.embeddings.position_embedding"]
    assert (resized.shape, resized.dtype) == ((1, 1 + grid**2, E), torch.float32)
    assert torch.equal(resized[:, 0], old[:, 0])
    np.testing.assert_allclose(resized[0, 1:].numpy(), expected, rtol=0, atol=1e-6)
    ours, published = captioner_pair(config, weights)
    by_ours, by_published, original = logits_of(ours, published, state | {"visual_encoder.pos_embed": resized})
    torch.testing.assert_close(by_ours, by_published, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_ours, original, rtol=0, atol=1e-5)


def test_position_embeddings_of_the_same_size_are_untouched_and_of_an_impossible_one_refused() -> None:
    state = captioner_state()
    for image_size in (None, IMAGE_SIZE):
        weights = blip_from_salesforce(state, "x", image_size=image_size)[1]
        assert torch.equal(weights["vision_model.embeddings.position_embedding"], state["visual_encoder.pos_embed"])
    for image_size in (0, -PATCH, IMAGE_SIZE + 1):
        with pytest.raises(CheckpointError, match=rf"images of {image_size} pixels cannot be cut .* 4 that 'x' was"):
            blip_from_salesforce(state, "x", image_size=image_size)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    resized = blip_from_salesforce(half, "x", image_size=5 * PATCH)[1]["vision_model.embeddings.position_embedding"]
    assert resized.dtype == torch.float16


def test_other_heads_of_a_pretraining_checkpoint_are_dropped_and_named() -> None:
    captioner, scorer, beside = captioner_state(), drawn(scorer_shapes(), 1), drawn(beside_shapes(), 2)
    state = scorer | beside | captioner
    _, weights, dropped = blip_from_salesforce(state, "x")
    expected = blip_from_salesforce(captioner, "x")[1]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert set(dropped) == (scorer.keys() | beside.keys()) - captioner.keys()
    assert {name.partition(".")[0] for name in dropped} == {
        *("text_encoder", "vision_proj", "text_proj", "itm_head"),
        *("visual_encoder_m", "text_encoder_m", "vision_proj_m", "text_proj_m"),
        *("image_queue", "text_queue", "queue_ptr", "temp"),
    }

    state |= {"ptr_queue": torch.zeros(1, dtype=torch.long), "idx_queue": torch.full((1, 8), -100)}  # of fine-tuning
    _, weights, dropped = retrieval_from_salesforce(captioner | state, "x")
    expected = retrieval_from_salesforce(scorer | {n: t for n, t in captioner.items() if "visual" in n}, "x")[1]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert {name.partition(".")[0] for name in dropped} == {
        *("text_decoder", "visual_encoder_m", "text_encoder_m", "vision_proj_m", "text_proj_m"),
        *("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue", "temp"),
    }


def test_an_output_layer_that_pretraining_untied_is_what_counts_as_in_the_originals_loader() -> None:
    """load_state_dict copies both names into the one parameter of BLIP_Decoder: the output layer's comes last."""
    state = captioner_state()
    predictions, words = "text_decoder.cls.predictions", "text_decoder.bert.embeddings.word_embeddings.weight"
    generator = torch.Generator().manual_seed(4)
    state[f"{predictions}.decoder.weight"] = torch.randn(VOCAB_SIZE, D, generator=generator)
    state[f"{predictions}.decoder.bias"] = torch.randn(VOCAB_SIZE, generator=generator)
    state[f"{predictions}.bias"] = torch.randn(VOCAB_SIZE - 2)  # from before the vocabulary grew
    _, weights, _ = blip_from_salesforce(state, "x")
    assert torch.equal(weights[words], state[f"{predictions}.decoder.weight"])
    assert torch.equal(weights[f"{predictions}.bias"], state[f"{predictions}.decoder.bias"])
    del state[f"{predictions}.decoder.weight"], state[f"{predictions}.decoder.bias"]
    state[f"{predictions}.bias"] = torch.randn(VOCAB_SIZE)
    assert torch.equal(blip_from_salesforce(state, "x")[1][words], state[words])


def test_a_scorer_in_the_original_layout_gives_the_scores_of_transformers(tmp_path: Path) -> None:
    state = drawn(scorer_shapes() | beside_shapes(), 3)
    torch.save({"model": state}, tmp_path / "retrieval.pth")
    config, weights, dropped = retrieval_from_salesforce(read_pickled(tmp_path / "retrieval.pth"), "retrieval.pth")
    assert len(dropped) == len(beside_shapes())
    assert config["image_text_hidden_size"] == W
    ours, published = (
        model(BlipConfig.from_dict(config)).eval() for model in (BlipRetrieval, BlipForImageTextRetrieval)
    )
    ours.load_state_dict(weights)  # strict: no key is missing, none is unexpected
    published.load_state_dict(weights)
    pixels, ids = batch()
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    image = ours.encode_image(pixels)
    torch.testing.assert_close(image.states_BTE, original_vision(state, pixels), rtol=0, atol=1e-5)
    with torch.no_grad():
        logits = published(ids, pixels, use_itm_head=True, attention_mask=mask).itm_score
        cosines = published(ids, pixels, use_itm_head=False, attention_mask=mask).itm_score.diagonal()
    torch.testing.assert_close(ours.match(image, ids, mask), logits.softmax(1)[:, 1], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.cosine(image, ids, mask), cosines, rtol=0, atol=1e-5)


IMPORTS = [
    pytest.param(blip_from_salesforce, captioner_state(), id="captioner"),
    pytest.param(retrieval_from_salesforce, drawn(scorer_shapes()), id="scorer"),
]


@pytest.mark.parametrize(("convert", "state"), IMPORTS)
def test_every_single_missing_tensor_is_noticed(convert: Callable[..., Any], state: dict[str, Tensor]) -> None:
    tied = {*TIED_NAMES, *TIED_NAMES.values()}  # under one of their names they are not missing
    for name in state:
        if name not in tied and not name.endswith("position_ids"):
            with pytest.raises(CheckpointError, match=r"'a\.pth'"):
                convert({key: tensor for key, tensor in state.items() if key != name}, "a.pth")
    for second_name, name in TIED_NAMES.items():
        rest = {key: tensor for key, tensor in state.items() if key not in (second_name, name)}
        if len(rest) < len(state):
            with pytest.raises(CheckpointError, match=re.escape(repr(name))):
                convert(rest, "a.pth")


@pytest.mark.parametrize(("convert", "state"), IMPORTS)
def test_every_tensor_of_another_shape_or_of_integers_is_noticed(
    convert: Callable[..., Any], state: dict[str, Tensor]
) -> None:
    replaced = set(TIED_NAMES.values()) & state.keys() if TIED_NAMES.keys() <= state.keys() else set()
    for name, tensor in state.items():
        if name in replaced or name.endswith("position_ids"):
            continue
        for other in (torch.zeros(*tensor.shape, 2), tensor[..., :0], tensor.long()):
            with pytest.raises(CheckpointError, match=r"'a\.pth'"):
                convert({**state, name: other}, "a.pth")


@pytest.mark.parametrize(("convert", "state"), IMPORTS)
def test_what_does_not_fit_is_counted_and_named(convert: Callable[..., Any], state: dict[str, Tensor]) -> None:
    norm = "visual_encoder.norm.weight"
    message = r"of 'a\.pth' are not those of one BLIP .*: {} missing, {} unknown, {} of another shape or dtype \(first: '{}'\)"
    for given, numbers, first in (
        ({name: tensor for name, tensor in state.items() if name != norm}, (1, 0, 0), norm),
        ({**state, "visual_encoder.head.weight": torch.zeros(1)}, (0, 1, 0), "visual_encoder.head.weight"),
        ({**state, norm: torch.zeros(E + 1)}, (0, 0, 1), norm),
        ({**state, norm: torch.zeros(E, dtype=torch.long)}, (0, 0, 1), norm),
    ):
        with pytest.raises(CheckpointError, match=message.format(*numbers, re.escape(first))):
            convert(given, "a.pth")
    middle = {name: tensor for name, tensor in state.items() if ".blocks.0." not in name}
    with pytest.raises(CheckpointError, match=r"'a\.pth' lacks 'visual_encoder\.blocks\.0\.mlp\.fc1\.weight'"):
        convert(middle, "a.pth")
    flat = {**state, "visual_encoder.pos_embed": torch.zeros(1, GRID**2, E)}
    with pytest.raises(CheckpointError, match=r"'a\.pth' has 9 positions for patches of 4 x 4 with 3 channels"):
        convert(flat, "a.pth")
    with pytest.raises(CheckpointError, match=r"'visual_encoder\.pos_embed' in 'a\.pth' has shape \(10, 128\), not 3"):
        convert({**state, "visual_encoder.pos_embed": torch.zeros(10, E)}, "a.pth")


def test_models_of_other_tasks_are_refused() -> None:
    questions = captioner_state() | drawn(bert_shapes("text_encoder"))
    with pytest.raises(
        CheckpointError, match=r"'vqa\.pth' holds a text encoder without itm_head, as BLIP for question"
    ):
        blip_from_salesforce(questions, "vqa.pth")
    with pytest.raises(CheckpointError, match=r"'vqa\.pth' lacks 'text_proj\.weight'"):
        retrieval_from_salesforce(questions, "vqa.pth")
    with pytest.raises(CheckpointError, match=r"'r\.pth' lacks 'text_decoder\."):
        blip_from_salesforce(drawn(scorer_shapes()), "r.pth")
    with pytest.raises(CheckpointError, match=r"'clip\.pth' lacks 'visual_encoder\.patch_embed\.proj\.weight'"):
        blip_from_salesforce({"clip_project.weight": torch.zeros(2, 2)}, "clip.pth")


# ---- Files


class Trap:
    """What a pickle can do to those who load it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.file),))


def test_reading_a_pickled_file_warns_in_one_line_that_names_it(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="weights_only=True") as caught:
        read_pickled(str(tmp_path / "a.pth"))
    (warning,) = caught
    assert f"'{tmp_path}/a.pth' is a pickled file" in str(warning.message)
    assert "\n" not in str(warning.message)
    assert warning.filename == __file__


def test_what_torch_saved_is_read_as_it_is_in_new_and_old_files(tmp_path: Path) -> None:
    state = drawn(scorer_shapes() | beside_shapes())
    state |= {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "e": torch.ones(0),
    }
    state["parameter"] = torch.nn.Parameter(torch.arange(6.0).view(2, 3).T)
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "packed.pt", "w", 8) as packed:
        for name in new.namelist():
            packed.writestr(name, new.read(name))
    for name in ("new.pt", "old.pt", "packed.pt"):
        read = read_pickled(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(t.dtype == state[n].dtype and torch.equal(t, state[n]) for n, t in read.items())
        assert {type(tensor) for tensor in read.values()} == {Tensor}
        assert not any(tensor.requires_grad for tensor in read.values())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("form", ["zip", "old", "bare pickle", "beside the weights", "as a tensor"])
def test_a_pickle_with_a_payload_is_refused_and_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, form: str
) -> None:
    sprung = tmp_path / "sprung"
    path = tmp_path / f"weights{suffix}"
    state = captioner_state()
    match form:
        case "zip":
            torch.save(Trap(sprung), path)
        case "old":
            torch.save({"model": Trap(sprung)}, path, _use_new_zipfile_serialization=False)
        case "bare pickle":
            path.write_bytes(pickle.dumps({"a": Trap(sprung)}, protocol=2))
        case "beside the weights":
            torch.save({"model": state, "args": Trap(sprung)}, path)
        case _:
            torch.save({"model": {**state, "visual_encoder.norm.weight": Trap(sprung)}}, path)
    # The switch with which torch can be told to trust every file has no say here.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match=rf"'{re.escape(str(path))}' .*; (choose|give) ") as caught:
        read_pickled(path)
    if suffix != ".safetensors":
        assert "asks for 'posix.mkdir', which raycap does not run" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    with pytest.raises(CheckpointError, match=rf"'weights{re.escape(suffix)}' of 'folder' cannot be read"):
        read_weights([path], "folder")
    assert not sprung.exists()
    if form == "bare pickle":
        pickle.loads(path.read_bytes())
        assert sprung.exists()  # the trap works


def test_files_that_are_damaged_or_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    state = {"model": drawn(head_shapes())}
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    wrong: dict[str, bytes] = {
        "empty.pth": b"",
        "text.pth": b"<!DOCTYPE html><html>not found</html>",
        "nul.pth": bytes(999),
    }
    for kind in ("new", "old"):
        whole = (tmp_path / f"{kind}.pth").read_bytes()
        for cut in (1, 10, 100, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
            wrong[f"{kind} {cut}.pth"] = whole[:cut]
        wrong[f"{kind} turned.pth"] = whole[len(whole) // 2 :] + whole[: len(whole) // 2]
    save_file({"a": torch.ones(2)}, tmp_path / "renamed.pth")
    wrong["renamed.pth"] = (tmp_path / "renamed.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "cut.pth", "w") as cut_short:
        for name in new.namelist():
            cut_short.writestr(name, new.read(name)[: 10 if "/data/" in name else None])
    wrong["cut.pth"] = (tmp_path / "cut.pth").read_bytes()
    for name, content in wrong.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"^'{re.escape(str(path))}' cannot be read .* again$") as caught:
            read_pickled(path)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(path))


def test_a_place_without_a_file_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.pth", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(CheckpointError, match=rf"'{path}' cannot be read \({reason}\); check the path"):
            read_pickled(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(2)], "holds a value of type list where named tensors are expected"),
        (torch.ones(2), "holds a value of type Tensor where named tensors are expected"),
        ("weights", "holds a value of type str where named tensors are expected"),
        ({}, "holds an empty dict where named tensors are expected"),
        ({"model": {}}, "holds an empty dict where named tensors are expected"),
        ({"model": torch.ones(2), "epoch": 3}, "holds a value of type int under 'epoch'"),
        ({"a": torch.ones(2), "b": 7}, "holds a value of type int under 'b'"),
        ({"model": {"a": {"b": torch.ones(2)}}}, "holds a value of type dict under 'a'"),
        ({3: torch.ones(2)}, "holds a value of type Tensor under 3"),
        ({"a": torch.eye(3).to_sparse()}, "under 'a' where a dense tensor is expected"),
        ({"a": torch.empty(3, device="meta")}, "under 'a' where a dense tensor is expected"),
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "under 'a' where a dense tensor is expected"),
        ({"model": {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}}, "broken: 'b' holds values that are inf"),
        ({"state_dict": {"a": torch.tensor(-torch.inf)}}, "broken: 'a' holds values that are infinite or NaN"),
        ({"a": torch.tensor([torch.inf, -torch.inf]).half()}, "broken: 'a' holds values that are infinite or NaN"),
    ],
)
def test_what_is_no_state_dict_of_finite_dense_tensors_is_refused(tmp_path: Path, content: Any, sentence: str) -> None:
    path = tmp_path / "a.pth"
    torch.save(content, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said of a file that is not read
        with pytest.raises(CheckpointError, match=sentence) as caught:
            read_pickled(path)
    assert f"'{path}'" in str(caught.value)


def test_large_values_that_are_finite_are_no_damage(tmp_path: Path) -> None:
    state = {"a": torch.full((9,), 3e38), "b": torch.full((9,), 6e4, dtype=torch.float16)}
    torch.save(state, tmp_path / "a.pth")
    assert torch.equal(read_pickled(tmp_path / "a.pth")["a"], state["a"])


# ---- safetensors, by raycap/checkpoint/weights.py


def header_file(path: Path, length: int, header: bytes, data: bytes = b"") -> Path:
    """A safetensors file that says its header is so long."""
    path.write_bytes(struct.pack("<Q", length) + header + data)
    return path


def test_damaged_safetensors_are_refused_by_name(tmp_path: Path) -> None:
    save_file(drawn(head_shapes()), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    tensor = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}'
    wrong = {
        "empty": b"",
        "cut in the header": whole[:100],
        "cut in the data": whole[:-1],
        "longer": whole + b"x",
        "no json": struct.pack("<Q", 8) + b"{{{{{{{{",
        "not utf-8": struct.pack("<Q", 8) + b'{"\xff\xfe":1}',
        "shape beyond the data": struct.pack("<Q", len(tensor % (9, 8))) + tensor % (9, 8) + bytes(8),
        "endless shape": struct.pack("<Q", len(tensor % (2**62, 8))) + tensor % (2**62, 8) + bytes(8),
        "deep": struct.pack("<Q", 10**5) + b'{"a":' * 20_000,
    }
    for name, content in wrong.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"'{name}\.safetensors' of 'folder' cannot be read"):
            read_weights([path], "folder")


def test_a_header_of_100_mb_is_refused_without_being_held(tmp_path: Path) -> None:
    size = 100_000_001
    with (tmp_path / "true.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", size))
        file.truncate(8 + size)  # a hole of zeros
    header_file(tmp_path / "lie.safetensors", size, b"{}")
    header_file(tmp_path / "shorter lie.safetensors", size - 1000, b"{}")
    header_file(tmp_path / "giant.safetensors", 2**63, b"{}")
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("true", "lie", "shorter lie", "giant"):
        with pytest.raises(
            CheckpointError, match=rf"'{name}\.safetensors' of 'folder' cannot be read \(.*; copy the file"
        ):
            read_weights([tmp_path / f"{name}.safetensors"], "folder")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kb < 50_000
