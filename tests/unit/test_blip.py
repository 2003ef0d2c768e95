"""Our BLIP against transformers' BlipForConditionalGeneration: names, loss, gradients, caches."""

import pytest
import torch
import torch.nn.functional as F
from model_checks import empty_parameters_outside_their_module, gradients, largest_relative_difference
from safetensors.torch import load_file
from tiny import EOS_ID, PAD_ID, tiny_blip_config, tiny_blip_pair
from tiny_gpt2 import set_by_formula
from torch import Tensor
from transformers import BlipForConditionalGeneration

from raycap.models import build_model
from raycap.models.absorbed import MAX_BEAMS
from raycap.models.blip import TIED_NAMES, Blip
from raycap.models.linear import ONEDNN_FROM, Linear

torch.set_num_threads(1)

BOS_ID = 58


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def captions(rows: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, "[DEC] 7 8 words... [SEP]", padded on the right; the prompt 7 8 carries no label."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.full((rows, 12), PAD_ID)
    labels = torch.full((rows, 12), -100)
    for row in range(rows):
        num_words = 3 + row % 6
        words = torch.randint(4, BOS_ID, (num_words,), generator=generator)
        text = torch.cat([torch.tensor([BOS_ID, 7, 8]), words, torch.tensor([EOS_ID])])
        input_ids[row, : len(text)] = text
        labels[row, 3 : len(text)] = text[3:]
    return input_ids, labels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_loss_and_every_gradient_equal_transformers(dtype: torch.dtype, tolerance: float) -> None:
    ours, published = (model.to(dtype) for model in tiny_blip_pair())
    pixel_values, (input_ids, labels) = images(4).to(dtype), captions(4)

    loss_sum, num_targets = ours(pixel_values, input_ids, labels)
    expected = published(pixel_values, input_ids, attention_mask=(input_ids != PAD_ID).long(), labels=labels)

    assert loss_sum.dtype == dtype
    assert num_targets.dtype == torch.int64
    assert num_targets == (labels[:, 1:] != -100).sum()
    assert (loss_sum / num_targets).item() == pytest.approx(expected.loss.item(), rel=tolerance)
    our_gradients = gradients(ours, loss_sum / num_targets)
    assert len(our_gradients) == len(list(ours.parameters()))
    assert largest_relative_difference(our_gradients, gradients(published, expected.loss)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logits_of_a_full_text_and_of_one_token_at_a_time_equal_transformers(
    dtype: torch.dtype, tolerance: float
) -> None:
    ours, published = (model.to(dtype) for model in tiny_blip_pair())
    pixel_values = images(3).to(dtype)
    text = torch.randint(4, BOS_ID, (3, 40))  # longer than the first allocation of the cache
    text[:, :3] = torch.tensor([BOS_ID, 7, 8])
    with torch.no_grad():
        expected_NLV = published(pixel_values, text).logits

        image = ours.encode_image(pixel_values)
        full_NLV = ours.text_decoder.cls(ours.text_decoder.bert(text, image))
        state = ours.start(image, text[0, :3])
        steps_NLV = torch.stack([ours.step(state, text[:, i]) for i in range(2, text.shape[1])], dim=1)

    scale = expected_NLV.abs().max()
    assert (full_NLV - expected_NLV).abs().max() < tolerance * scale
    assert (steps_NLV - expected_NLV[:, 2:]).abs().max() < tolerance * scale


def test_a_large_product_by_another_library_is_that_of_torch() -> None:
    """Values and gradients, of rows that lie side by side and of rows that do not; and bfloat16 stays with torch."""
    torch.manual_seed(0)
    layer = Linear(96, 512)
    for given in (torch.randn(4, 40, 96), torch.randn(4, 96, 40).transpose(1, 2), torch.randn(120, 96)):
        assert given.numel() * 512 > ONEDNN_FROM
        found, expected = ([given.clone().requires_grad_(), *layer.parameters()] for _ in range(2))
        output = layer(found[0])
        by_torch = F.linear(*expected)
        assert output.is_contiguous()
        torch.testing.assert_close(output, by_torch, rtol=1e-5, atol=1e-5)
        weight_of_each = torch.randn_like(output)
        ours = torch.autograd.grad((output * weight_of_each).sum(), found)
        theirs = torch.autograd.grad((by_torch * weight_of_each).sum(), expected)
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine - other).abs().max() < 1e-5 * other.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(given).dtype == torch.bfloat16
    assert torch.equal(layer.double()(given.double()), F.linear(given.double(), layer.weight, layer.bias))


def test_the_loss_sees_the_padding_of_no_row() -> None:
    ours, _ = tiny_blip_pair()
    input_ids, labels = captions(4)
    other_padding = torch.where(input_ids == PAD_ID, 9, input_ids)
    assert torch.equal(ours(images(4), input_ids, labels)[0], ours(images(4), other_padding, labels)[0])


def test_label_smoothing_is_that_of_torch() -> None:
    ours, published = tiny_blip_pair(label_smoothing=0.1)
    pixel_values, (input_ids, labels) = images(4), captions(4)
    loss_sum, num_targets = ours(pixel_values, input_ids, labels)

    expected = published(pixel_values, input_ids, labels=labels)
    by_torch = F.cross_entropy(expected.logits[:, :-1].transpose(1, 2), labels[:, 1:], label_smoothing=0.1)
    assert (loss_sum / num_targets).item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert (loss_sum / num_targets).item() == pytest.approx(by_torch.item(), rel=1e-6)


def test_captions_that_share_an_image_equal_one_row_per_image() -> None:
    ours, _ = tiny_blip_pair()
    pixel_values, (input_ids, labels) = images(2), captions(6)

    shared, num_targets = ours(pixel_values, input_ids, labels)
    shared_gradients = gradients(ours, shared)
    alone, num_targets_alone = ours(pixel_values.repeat_interleave(3, dim=0), input_ids, labels)

    assert num_targets == num_targets_alone
    assert shared.item() == pytest.approx(alone.item(), rel=1e-6)
    assert largest_relative_difference(shared_gradients, gradients(ours, alone)) < 1e-5


def test_a_batch_whose_images_differ_in_captions_is_refused() -> None:
    ours, _ = tiny_blip_pair()
    with pytest.raises(ValueError, match="got 3 rows for 2 images"):
        ours(images(2), *captions(3))


def test_rows_without_targets_add_nothing_and_a_batch_of_them_gives_zero_gradients_everywhere() -> None:
    ours, _ = tiny_blip_pair()
    pixel_values, (input_ids, labels) = images(4), captions(4)
    half = labels.clone()
    half[2:] = -100
    loss, num_targets = ours(pixel_values, input_ids, half)
    expected, expected_targets = ours(pixel_values[:2], input_ids[:2], labels[:2])
    assert num_targets == expected_targets
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    ours.train()
    loss, num_targets = ours(pixel_values, input_ids, torch.full_like(labels, -100))
    assert (loss.item(), int(num_targets)) == (0.0, 0)
    zeros = gradients(ours, loss)
    assert len(zeros) == len(list(ours.parameters()))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in zeros.values())


def test_bfloat16_weights_give_a_float32_loss_and_float32_logits() -> None:
    ours = tiny_blip_pair()[0].bfloat16()
    assert ours(images(2), *captions(2))[0].dtype == torch.float32
    state = ours.start(ours.encode_image(images(2)), torch.tensor([BOS_ID]))
    assert ours.step(state, torch.tensor([BOS_ID, BOS_ID])).dtype == torch.float32


def test_dropout_is_where_the_configuration_puts_it() -> None:
    config = tiny_blip_config()
    config.text_config.hidden_dropout_prob = 1.0  # drops every update and the embeddings: no image, no text is left
    ours = Blip(config).train()
    input_ids, labels = captions(2)
    assert torch.equal(ours(images(2), input_ids, labels)[0], ours(images(2, seed=9), input_ids, labels)[0])

    config = tiny_blip_config()
    config.text_config.attention_probs_dropout_prob = config.vision_config.attention_dropout = 0.5
    ours = Blip(config)
    assert torch.equal(*(ours.eval()(images(2), input_ids, labels)[0] for _ in range(2)))
    assert not torch.equal(*(ours.train()(images(2), input_ids, labels)[0] for _ in range(2)))


def test_state_dicts_load_strictly_both_ways_and_ties_hold(tmp_path) -> None:
    ours, published = tiny_blip_pair()
    assert ours.state_dict().keys() == published.state_dict().keys()
    published.load_state_dict(ours.state_dict(), strict=True)
    for second_name, name in TIED_NAMES.items():
        assert ours.get_parameter(second_name) is ours.get_parameter(name)

    published.save_pretrained(tmp_path)
    assert set(ours.state_dict()) - set(load_file(tmp_path / "model.safetensors")) == set(TIED_NAMES)


def test_fresh_weights_are_drawn_as_transformers_draws_them() -> None:
    torch.manual_seed(0)
    config = tiny_blip_config()
    ours = build_model("blip", config.to_dict()).state_dict()
    for name, theirs in BlipForConditionalGeneration(config).state_dict().items():
        if theirs.std() < 1e-6:
            assert torch.equal(ours[name], theirs), name
        else:
            assert ours[name].mean().abs() < 4 * 0.02 / theirs.numel() ** 0.5, name  # four standard errors
            assert float(ours[name].std() / theirs.std()) == pytest.approx(1, abs=4 / theirs.numel() ** 0.5), name
    assert not ours["text_decoder.bert.embeddings.word_embeddings.weight"][PAD_ID].any()


def test_an_unknown_kind_or_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown model kind 'clip'; known kinds: blip"):
        build_model("clip", {})
    config = tiny_blip_config()
    config.text_config.hidden_act = "relu"
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        Blip(config)


def test_inputs_that_do_not_fit_are_refused() -> None:
    ours, _ = tiny_blip_pair()
    with pytest.raises(ValueError, match=r"takes pixel_values \(images, 3, 32, 32\), got \(1, 3, 24, 24\)"):
        ours.encode_image(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="reads 64 text tokens, got 70"):
        ours.text_decoder.bert(torch.zeros(1, 70, dtype=torch.long), ours.encode_image(images(1)))


def test_beams_go_on_from_the_rows_that_reorder_names() -> None:
    ours, published = tiny_blip_pair()
    pixel_values, prompt = images(2), torch.tensor([BOS_ID, 7, 8])
    image = ours.encode_image(pixel_values)
    state = ours.start(image, prompt, beams=2)
    assert state.num_rows == 4
    assert state.image.states_BTE is image.states_BTE
    ours.step(state, prompt[-1].expand(4))
    ours.step(state, torch.tensor([10, 11, 12, 13]))
    state.reorder(torch.tensor([1, 1, 3, 2]))
    logits_NV = ours.step(state, torch.tensor([20, 21, 22, 23]))

    texts = torch.tensor([[BOS_ID, 7, 8, *tail] for tail in ([11, 20], [11, 21], [13, 22], [12, 23])])
    with torch.no_grad():
        expected_NV = published(pixel_values.repeat_interleave(2, dim=0), texts).logits[:, -1]
    torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [[BOS_ID], [BOS_ID, 7, 8]])
def test_images_that_are_kept_go_on_with_all_their_beams(prompt: list[int]) -> None:
    ours, published = tiny_blip_pair()
    pixel_values, prompt_ids = images(3), torch.tensor(prompt)
    image = ours.encode_image(pixel_values)
    state = ours.start(image, prompt_ids, beams=2)
    state.keep(torch.tensor([2, 0, 1]))  # before the first step there may be no cache yet
    ours.step(state, prompt_ids[-1].expand(6))
    state.keep(torch.tensor([2, 0]))  # images 1 and 2
    assert state.num_rows == 4
    logits_NV = ours.step(state, torch.tensor([20, 21, 22, 23]))

    texts = torch.tensor([[*prompt, last] for last in (20, 21, 22, 23)])
    with torch.no_grad():
        expected_NV = published(pixel_values[[1, 1, 2, 2]], texts).logits[:, -1]
    torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-5, atol=1e-5)
    assert len(image.states_BTE) == 3


def test_cross_attention_keys_are_projected_once_per_image() -> None:
    ours, _ = tiny_blip_pair()
    rows = []
    for module_name, module in ours.named_modules():
        if module_name.endswith("crossattention.self.key"):
            module.register_forward_hook(lambda _module, _inputs, output: rows.append(len(output)))
    image = ours.encode_image(images(2))
    for _ in range(2):
        state = ours.start(image, torch.tensor([BOS_ID, 7]), beams=MAX_BEAMS + 1)
        for _ in range(4):
            ours.step(state, torch.full((2 * (MAX_BEAMS + 1),), 9))
    assert rows == [2, 2]  # two layers, each once, one row per image and none per beam


def test_for_few_beams_no_keys_are_projected_and_the_logits_are_the_same() -> None:
    ours, _ = tiny_blip_pair()
    ids = torch.arange(5, 11)
    image = ours.encode_image(images(2))
    few = ours.start(image, torch.tensor([BOS_ID, 7, 8]), beams=MAX_BEAMS)
    found = [ours.step(few, ids) for _ in range(2)]
    assert not image.cross
    many = ours.start(image, torch.tensor([BOS_ID, 7, 8]), beams=MAX_BEAMS + 1)
    rows = torch.tensor([0, 1, 2, 4, 5, 6])
    for expected in found:
        logits = ours.step(many, torch.zeros(8, dtype=torch.int64).index_copy(0, rows, ids))
        torch.testing.assert_close(expected, logits[rows], rtol=1e-5, atol=1e-5)
    assert image.cross


def test_a_loss_after_decoding_from_the_same_image_state_has_all_its_gradients() -> None:
    ours, _ = tiny_blip_pair()
    input_ids, labels = captions(2)
    expected = gradients(ours, ours(images(2), input_ids, labels)[0])
    image = ours.encode_image(images(2))
    ours.step(ours.start(image, torch.tensor([BOS_ID, 7])), torch.tensor([8, 8]))
    assert largest_relative_difference(gradients(ours, ours.loss(image, input_ids, labels)[0]), expected) < 1e-6


def test_parameters_are_used_only_inside_the_module_that_owns_them() -> None:
    ours, _ = tiny_blip_pair()
    pixel_values, (input_ids, labels) = images(2), captions(4)

    @torch.no_grad()
    def run() -> list[Tensor]:
        state = ours.start(ours.encode_image(pixel_values), torch.tensor([BOS_ID, 7]))
        return [ours(pixel_values, input_ids, labels)[0], ours.step(state, torch.tensor([8, 8]))]

    expected = run()
    empty_parameters_outside_their_module(ours)
    for result, value in zip(run(), expected, strict=True):
        assert torch.equal(result, value)


# Computed with transformers' BlipForConditionalGeneration in float64; weights and image are given by formulas.
GOLDEN = [0.490996570010890, 0.625005530592189, -0.357509345803088, -0.661408568309152]
GOLDEN_LOSS = 4.096070555061436


@torch.no_grad()
def test_logits_and_loss_of_weights_given_by_a_formula_stay_what_they_were() -> None:
    config = tiny_blip_config()
    published = set_by_formula(BlipForConditionalGeneration(config).double()).eval()
    ours = Blip(config).double().eval()
    ours.load_state_dict(published.state_dict())
    pixel_values = torch.cos(torch.arange(3 * 32 * 32, dtype=torch.float64) * 0.37).view(1, 3, 32, 32)
    ids = torch.tensor([[58, 5, 14, 15, 9, EOS_ID]])
    state = ours.start(ours.encode_image(pixel_values), ids[0])
    loss_sum, num_targets = ours(pixel_values, ids, ids)
    theirs = published(pixel_values, ids, labels=ids)
    for logits in (ours.step(state, ids[:, -1])[0, :4], theirs.logits[0, -1, :4]):
        assert logits.tolist() == pytest.approx(GOLDEN, abs=1e-9)
    for loss in (loss_sum / num_targets, theirs.loss):
        assert loss.item() == pytest.approx(GOLDEN_LOSS, abs=1e-9)
