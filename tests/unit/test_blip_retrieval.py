"""raycap/models/blip_retrieval.py: the scores are those of transformers' BlipForImageTextRetrieval, whatever the batch."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import BlipConfig, BlipForImageTextRetrieval

from raycap.models.blip_retrieval import BlipRetrieval

torch.set_num_threads(1)

VOCAB_SIZE, NUM_POSITIONS, IMAGE_SIZE, NUM_LAYERS = 60, 20, 16, 3
B, K, L = 3, 4, 11


def retrieval_config() -> BlipConfig:
    """The two towers differ in every size, so that nothing fits by chance. Dropout is on, as BLIP trained."""
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 3,
        "max_position_embeddings": NUM_POSITIONS,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
    }
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)


@pytest.fixture
def pair() -> tuple[BlipRetrieval, BlipForImageTextRetrieval]:
    """Ours and transformers' model with the same weights, all of them far from their usual start."""
    config = retrieval_config()
    published = BlipForImageTextRetrieval(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in published.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name.lower() and "weight" in name else noise)
    ours = BlipRetrieval(config).eval()
    ours.load_state_dict(published.state_dict())
    return ours, published


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """B images, and K texts of different lengths for each, padded to L."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(B, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    ids = torch.randint(1, VOCAB_SIZE, (B * K, L), generator=generator)
    lengths = torch.randint(1, L + 1, (B * K,), generator=generator)
    lengths[0] = L
    mask = (torch.arange(L) < lengths[:, None]).long()
    return pixels, ids * mask, mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_scores_of_several_texts_per_image_are_those_of_transformers_also_with_padding(
    pair: tuple[BlipRetrieval, BlipForImageTextRetrieval], dtype: torch.dtype, tolerance: float
) -> None:
    ours, published = (model.to(dtype) for model in pair)
    pixels, ids, mask = batch()
    pixels = pixels.to(dtype)
    repeated = pixels.repeat_interleave(K, dim=0)
    with torch.no_grad():
        logits = published(ids, repeated, use_itm_head=True, attention_mask=mask).itm_score
        cosines = published(ids, repeated, use_itm_head=False, attention_mask=mask).itm_score.diagonal()
    state = ours.encode_image(pixels)
    match, cosine = ours.match(state, ids, mask), ours.cosine(state, ids, mask)
    assert match.dtype == cosine.dtype == dtype
    torch.testing.assert_close(match, logits.softmax(1)[:, 1], rtol=0, atol=tolerance)
    torch.testing.assert_close(cosine, cosines, rtol=0, atol=tolerance)
    assert match.std() > 0.05  # scores that do not differ would be equal for any weights
    assert cosine.std() > 0.05


def test_parameters_have_the_names_and_shapes_of_transformers(
    pair: tuple[BlipRetrieval, BlipForImageTextRetrieval],
) -> None:
    ours, published = ({name: t.shape for name, t in model.state_dict().items()} for model in pair)
    assert ours == published


def test_a_score_depends_on_neither_padding_nor_the_other_rows(
    pair: tuple[BlipRetrieval, BlipForImageTextRetrieval],
) -> None:
    ours = pair[0]
    pixels, ids, mask = batch()
    state = ours.encode_image(pixels)
    strangers = torch.where(mask.bool(), ids, 7)
    for score in (ours.match, ours.cosine):
        together = score(state, ids, mask)
        torch.testing.assert_close(score(state, strangers, mask.bool()), together, rtol=0, atol=1e-6)
        for row in range(B * K):
            alone = ours.encode_image(pixels[row // K : row // K + 1])
            length = int(mask[row].sum())
            text = ids[row : row + 1, :length]
            torch.testing.assert_close(score(alone, text, torch.ones_like(text))[0], together[row], rtol=0, atol=1e-5)


def test_the_first_token_reads_the_whole_text_and_its_own_image(
    pair: tuple[BlipRetrieval, BlipForImageTextRetrieval],
) -> None:
    ours = pair[0]
    pixels, ids, mask = batch()
    other = ids.clone()
    other[0, -1] = ids[0, -1] % (VOCAB_SIZE - 1) + 1  # row 0 has no padding
    others_pixels = pixels.clone()
    others_pixels[1] += 1
    for score in (ours.match, ours.cosine):
        before = score(ours.encode_image(pixels), ids, mask)
        text_changed = (score(ours.encode_image(pixels), other, mask) - before).abs() > 1e-4
        assert text_changed.nonzero().flatten().tolist() == [0]
        image_changed = (score(ours.encode_image(others_pixels), ids, mask) - before).abs() > 1e-4
        assert image_changed.nonzero().flatten().tolist() == list(range(K, 2 * K))


def test_all_texts_of_an_image_share_one_vision_pass_and_one_projection_of_it(
    pair: tuple[BlipRetrieval, BlipForImageTextRetrieval],
) -> None:
    ours = pair[0]
    rows: Counter[str] = Counter()
    for name, module in ours.named_modules():
        if name == "vision_model" or name.endswith((".crossattention.self.key", ".crossattention.self.value")):
            module.register_forward_hook(lambda _m, args, _o, name=name: rows.update({name: len(args[0])}))
    pixels, ids, mask = batch()
    state = ours.encode_image(pixels)
    ours.cosine(state, ids, mask)
    assert rows == {"vision_model": B}  # without cross-attention
    for _ in range(2):
        ours.match(state, ids, mask)
    assert len(rows) == 1 + 2 * NUM_LAYERS
    assert set(rows.values()) == {B}


def test_scores_are_made_without_a_graph_and_at_least_in_single_precision(
    pair: tuple[BlipRetrieval, BlipForImageTextRetrieval],
) -> None:
    ours = pair[0].bfloat16()
    pixels, ids, mask = batch()
    state = ours.encode_image(pixels)
    assert state.states_BTE.dtype == torch.bfloat16
    for score, lowest in ((ours.match, 0.0), (ours.cosine, -1.0)):
        values = score(state, ids, mask)
        assert (values.dtype, values.shape, values.requires_grad) == (torch.float32, (B * K,), False)
        assert values.min() >= lowest
        assert values.max() <= 1


def test_a_row_of_nothing_but_padding_gets_a_number_and_spoils_no_other(
    pair: tuple[BlipRetrieval, BlipForImageTextRetrieval],
) -> None:
    ours = pair[0]
    pixels, ids, mask = batch()
    empty = mask.clone()
    empty[5] = 0
    state = ours.encode_image(pixels)
    for score in (ours.match, ours.cosine):
        values, before = score(state, ids, empty), score(state, ids, mask)
        assert values.isfinite().all()
        rest = torch.arange(B * K) != 5
        torch.testing.assert_close(values[rest], before[rest], rtol=0, atol=1e-6)


def test_texts_that_do_not_fit_the_images_or_the_model_are_refused(
    pair: tuple[BlipRetrieval, BlipForImageTextRetrieval],
) -> None:
    ours = pair[0]
    pixels, ids, mask = batch()
    state = ours.encode_image(pixels)
    long = torch.ones(B, NUM_POSITIONS + 1, dtype=torch.long)
    for score in (ours.match, ours.cosine):
        with pytest.raises(ValueError, match=r"same number of text rows, got 11 rows for 3 images"):
            score(state, ids[1:], mask[1:])
        with pytest.raises(ValueError, match=r"need the same shape, got \(12, 11\) and \(1, 11\)"):
            score(state, ids, mask[:1])
        with pytest.raises(ValueError, match="reads 20 text tokens, got 21"):
            score(state, long, long)
    with pytest.raises(ValueError, match="takes pixel_values"):
        ours.encode_image(pixels[:, :, :-1])


def test_another_activation_than_blips_is_refused() -> None:
    config = retrieval_config()
    config.text_config.hidden_act = "gelu_new"
    with pytest.raises(ValueError, match="hidden_act='gelu_new'"):
        BlipRetrieval(config)
