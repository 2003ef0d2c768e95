"""Our ViT-GPT2 against transformers' VisionEncoderDecoderModel: names, files, loss, gradients, caches."""

import pytest
import torch
import torch.nn.functional as F
from model_checks import empty_parameters_outside_their_module, gradients, largest_relative_difference
from safetensors.torch import load_file, save_file
from tiny_gpt2 import (
    BOS_ID,
    IGNORED,
    VOCAB_SIZE,
    assert_drawn_alike,
    captions,
    lengths_mask,
    set_by_formula,
    tiny_vit_gpt2_config,
    tiny_vit_gpt2_pair,
)
from torch import Tensor, nn
from transformers import BertConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

from raycap.models.absorbed import MAX_BEAMS
from raycap.models.vit_gpt2 import TIED_NAMES, VitGpt2

torch.set_num_threads(1)

PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
WIDTHS = pytest.mark.parametrize("vision_width", [32, 48], ids=["towers of one width", "towers of two widths"])


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def logits_of(model: VitGpt2, pixel_values: Tensor, ids: Tensor) -> Tensor:
    image = model.encode_image(pixel_values)
    logits: Tensor = model.decoder.lm_head(model.decoder(model.decoder.embed(ids), image=image))
    return logits


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@WIDTHS
@PRECISIONS
def test_logits_loss_and_every_gradient_equal_transformers(
    dtype: torch.dtype, tolerance: float, vision_width: int
) -> None:
    ours, published = (model.to(dtype) for model in tiny_vit_gpt2_pair(vision_width=vision_width))
    pixel_values, (input_ids, labels) = images(4).to(dtype), captions(4)

    loss_sum, num_targets = ours(pixel_values, input_ids, labels)
    expected_NLV = published(
        pixel_values, decoder_input_ids=input_ids[:, :-1], decoder_attention_mask=lengths_mask(labels)[:, :-1]
    ).logits
    expected = F.cross_entropy(expected_NLV.transpose(1, 2), labels[:, 1:])

    difference = (logits_of(ours, pixel_values, input_ids[:, :-1]) - expected_NLV)[lengths_mask(labels)[:, :-1].bool()]
    assert difference.abs().max() < tolerance * expected_NLV.abs().max()
    assert loss_sum.dtype == dtype
    assert num_targets.dtype == torch.int64
    assert num_targets == (labels[:, 1:] != IGNORED).sum()
    assert (loss_sum / num_targets).item() == pytest.approx(expected.item(), rel=tolerance)
    our_gradients = gradients(ours, loss_sum / num_targets)
    assert list(our_gradients) == trained(ours)
    assert largest_relative_difference(our_gradients, gradients(published, expected)) < tolerance


def test_the_loss_equals_the_one_transformers_computes_from_labels() -> None:
    # It puts decoder_start_token_id in front of its labels, which is the first token of our texts.
    ours, published = tiny_vit_gpt2_pair()
    input_ids, labels = captions(4)
    labels[:, 1:3] = input_ids[:, 1:3]
    loss_sum, num_targets = ours(images(4), input_ids, labels)
    assert (loss_sum / num_targets).item() == pytest.approx(
        published(images(4), labels=labels[:, 1:]).loss.item(), rel=1e-5
    )


@WIDTHS
@PRECISIONS
@torch.no_grad()
def test_one_token_at_a_time_equals_transformers_on_the_whole_text(
    dtype: torch.dtype, tolerance: float, vision_width: int
) -> None:
    ours, published = (model.to(dtype) for model in tiny_vit_gpt2_pair(vision_width=vision_width))
    text = torch.randint(0, BOS_ID, (3, 40), generator=torch.Generator().manual_seed(3))  # the cache grows on the way
    text[:, :3] = torch.tensor([BOS_ID, 7, 8])
    expected_NLV = published(images(3).to(dtype), decoder_input_ids=text).logits
    state = ours.start(ours.encode_image(images(3).to(dtype)), text[0, :3])
    steps_NLV = torch.stack([ours.step(state, text[:, i]) for i in range(2, text.shape[1])], dim=1)
    assert (steps_NLV - expected_NLV[:, 2:]).abs().max() < tolerance * expected_NLV.abs().max()


def test_the_loss_sees_the_padding_of_no_row() -> None:
    ours, _ = tiny_vit_gpt2_pair()
    input_ids, labels = captions(4)
    other_padding = torch.where(lengths_mask(labels).bool(), input_ids, 9)
    assert torch.equal(ours(images(4), input_ids, labels)[0], ours(images(4), other_padding, labels)[0])


def test_label_smoothing_is_that_of_torch() -> None:
    ours, published = tiny_vit_gpt2_pair(label_smoothing=0.1)
    input_ids, labels = captions(4)
    loss_sum, num_targets = ours(images(4), input_ids, labels)
    logits_NLV = published(images(4), decoder_input_ids=input_ids[:, :-1]).logits
    expected = F.cross_entropy(logits_NLV.transpose(1, 2), labels[:, 1:], label_smoothing=0.1)
    assert (loss_sum / num_targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_captions_that_share_an_image_equal_one_row_per_image() -> None:
    ours, _ = tiny_vit_gpt2_pair(vision_width=48)
    pixel_values, (input_ids, labels) = images(2), captions(4)
    shared, num_targets = ours(pixel_values, input_ids, labels)
    shared_gradients = gradients(ours, shared)
    alone, num_targets_alone = ours(pixel_values.repeat_interleave(2, dim=0), input_ids, labels)
    assert num_targets == num_targets_alone
    assert shared.item() == pytest.approx(alone.item(), rel=1e-6)
    assert largest_relative_difference(shared_gradients, gradients(ours, alone)) < 1e-5


def test_rows_without_targets_add_nothing_and_a_batch_of_them_gives_zero_gradients_everywhere() -> None:
    ours, _ = tiny_vit_gpt2_pair(vision_width=48)
    pixel_values, (input_ids, labels) = images(4), captions(4)
    half = labels.clone()
    half[2:] = IGNORED
    loss, num_targets = ours(pixel_values, input_ids, half)
    expected, expected_targets = ours(pixel_values[:2], input_ids[:2], labels[:2])
    assert num_targets == expected_targets
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    ours.train()
    loss, num_targets = ours(pixel_values, input_ids, torch.full_like(labels, IGNORED))
    assert (loss.item(), int(num_targets)) == (0.0, 0)
    zeros = gradients(ours, loss)
    assert list(zeros) == trained(ours)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in zeros.values())


def test_all_is_trained_but_a_pooler_that_nothing_uses() -> None:
    pooler = {"encoder.pooler.dense.weight", "encoder.pooler.dense.bias"}
    ours, _ = tiny_vit_gpt2_pair()
    assert {name for name, _ in ours.named_parameters()} - set(trained(ours)) == pooler
    without, _ = tiny_vit_gpt2_pair(pooler=False)
    assert [name for name, _ in without.named_parameters()] == trained(without) == trained(ours)
    without.load_state_dict({name: t for name, t in ours.state_dict().items() if name not in pooler}, strict=True)
    assert torch.equal(logits_of(ours, images(2), captions(2)[0]), logits_of(without, images(2), captions(2)[0]))


@WIDTHS
@pytest.mark.parametrize("pooler", [True, False])
def test_a_folder_of_transformers_is_written_back_as_it_was(tmp_path, pooler: bool, vision_width: int) -> None:
    ours, published = tiny_vit_gpt2_pair(pooler=pooler, vision_width=vision_width)
    assert {name: t.shape for name, t in ours.state_dict().items()} == {
        name: t.shape for name, t in published.state_dict().items()
    }
    published.load_state_dict(ours.state_dict(), strict=True)
    assert ours.decoder.lm_head.weight is ours.decoder.transformer.wte.weight

    published.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    names = ours.published_names()
    assert list(names) == list(ours.state_dict())
    assert set(names.values()) - set(weights) == set(TIED_NAMES)
    written = {names[name]: tensor for name, tensor in ours.state_dict().items() if name not in TIED_NAMES}
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())

    # And a folder that we write loads in plain transformers, its configuration included.
    save_file({name: tensor + 1 for name, tensor in written.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = VisionEncoderDecoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == (set() if pooler else {n for n in loaded.state_dict() if "pooler" in n})
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    for name, tensor in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor + 1), name


def test_the_fields_that_are_ours_survive_a_configuration_file(tmp_path) -> None:
    config = tiny_vit_gpt2_config(label_smoothing=0.1)
    config.encoder.add_pooling_layer = False
    config.save_pretrained(tmp_path)
    for read in (VisionEncoderDecoderConfig.from_pretrained(tmp_path), VisionEncoderDecoderConfig(**config.to_dict())):
        model = VitGpt2(read)
        assert model.label_smoothing == 0.1
        assert not any("pooler" in name for name in model.state_dict())


@WIDTHS
def test_fresh_weights_are_drawn_as_transformers_draws_them(vision_width: int) -> None:
    torch.manual_seed(0)
    config = tiny_vit_gpt2_config(vision_width=vision_width, initializer_range=0.03)
    config.dtype = config.encoder.dtype = torch.bfloat16  # of a file; what we build is float32
    config.encoder._attn_implementation = "eager"  # of the caller; ours computes as BLIP's tower does
    ours = VitGpt2(config)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert ours.encoder.config._attn_implementation == "sdpa"
    assert config.encoder._attn_implementation == "eager"
    config.dtype = config.encoder.dtype = None
    assert_drawn_alike(ours.state_dict(), VisionEncoderDecoderModel(config).state_dict())


def test_configurations_of_another_kind_are_refused() -> None:
    config = tiny_vit_gpt2_config()
    config.decoder.add_cross_attention = False
    with pytest.raises(ValueError, match="add_cross_attention=False"):
        VitGpt2(config)
    config = tiny_vit_gpt2_config(cross_attention_hidden_size=48)
    with pytest.raises(ValueError, match="its own width 32, the decoder has cross_attention_hidden_size=48"):
        VitGpt2(config)
    other = VisionEncoderDecoderConfig(encoder=config.encoder.to_dict(), decoder=BertConfig().to_dict())
    with pytest.raises(ValueError, match="the configuration has 'vit' and 'bert'"):
        VitGpt2(other)


def test_inputs_that_do_not_fit_are_refused() -> None:
    ours, _ = tiny_vit_gpt2_pair()
    with pytest.raises(ValueError, match=r"24\*24.*32\*32"):
        ours.encode_image(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="got 3 rows for 2 images"):
        ours(images(2), *captions(3))


def test_bfloat16_weights_give_a_float32_loss_and_float32_logits() -> None:
    ours = tiny_vit_gpt2_pair(vision_width=48)[0].bfloat16()
    assert ours(images(2), *captions(2))[0].dtype == torch.float32
    state = ours.start(ours.encode_image(images(2)), torch.tensor([BOS_ID]))
    assert ours.step(state, torch.tensor([BOS_ID, BOS_ID])).dtype == torch.float32


@torch.no_grad()
def test_beams_go_on_from_the_rows_that_reorder_names() -> None:
    ours, published = tiny_vit_gpt2_pair()
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
    expected_NLV = published(pixel_values.repeat_interleave(2, dim=0), decoder_input_ids=texts).logits
    torch.testing.assert_close(logits_NV, expected_NLV[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [[BOS_ID], [BOS_ID, 7, 8]])
@torch.no_grad()
def test_images_that_are_kept_go_on_with_all_their_beams(prompt: list[int]) -> None:
    ours, published = tiny_vit_gpt2_pair()
    pixel_values, prompt_ids = images(3), torch.tensor(prompt)
    image = ours.encode_image(pixel_values)
    state = ours.start(image, prompt_ids, beams=2)
    state.keep(torch.tensor([2, 0, 1]))  # before the first step there may be no cache yet
    ours.step(state, prompt_ids[-1].expand(6))
    state.keep(torch.tensor([2, 0]))  # images 1 and 2
    assert state.num_rows == 4
    logits_NV = ours.step(state, torch.tensor([20, 21, 22, 23]))

    texts = torch.tensor([[*prompt, last] for last in (20, 21, 22, 23)])
    expected_NLV = published(pixel_values[[1, 1, 2, 2]], decoder_input_ids=texts).logits
    torch.testing.assert_close(logits_NV, expected_NLV[:, -1], rtol=1e-5, atol=1e-5)
    assert image.num_images == 3


def test_cross_attention_keys_are_projected_once_per_image() -> None:
    ours, _ = tiny_vit_gpt2_pair()
    rows = []
    for module_name, module in ours.named_modules():
        if module_name.endswith("crossattention.c_attn"):
            module.register_forward_hook(lambda _module, _inputs, output: rows.append(len(output)))
    image = ours.encode_image(images(2))
    for _ in range(2):
        state = ours.start(image, torch.tensor([BOS_ID, 7]), beams=MAX_BEAMS + 1)
        for _ in range(4):
            ours.step(state, torch.full((2 * (MAX_BEAMS + 1),), 9))
    assert rows == [2, 2]  # two layers, each once, one row per image and none per beam


def test_a_loss_after_decoding_from_the_same_image_state_has_all_its_gradients() -> None:
    ours, _ = tiny_vit_gpt2_pair()
    input_ids, labels = captions(2)
    expected = gradients(ours, ours(images(2), input_ids, labels)[0])
    image = ours.encode_image(images(2))
    ours.step(ours.start(image, torch.tensor([BOS_ID, 7])), torch.tensor([8, 8]))
    assert largest_relative_difference(gradients(ours, ours.loss(image, input_ids, labels)[0]), expected) < 1e-6


@torch.no_grad()
def test_parameters_are_used_only_inside_the_module_that_owns_them() -> None:
    ours, _ = tiny_vit_gpt2_pair(vision_width=48)
    pixel_values, (input_ids, labels) = images(2), captions(4)

    def run() -> list[Tensor]:
        state = ours.start(ours.encode_image(pixel_values), torch.tensor([BOS_ID, 7]))
        return [ours(pixel_values, input_ids, labels)[0], ours.step(state, torch.tensor([8, 8]))]

    expected = run()
    empty_parameters_outside_their_module(ours)
    for result, value in zip(run(), expected, strict=True):
        assert torch.equal(result, value)


# Computed with transformers' VisionEncoderDecoderModel in float64; weights and image are given by formulas.
GOLDEN = [
    [-1.158642766368, 1.890968820785, -2.060193859884, 1.615925306966],
    [-0.605127302333, 1.466962344138, -1.89195888478, 1.75355958449],
    [-1.869595127188, 2.191988212549, -1.86164140369, 0.976926826808],
]


@torch.no_grad()
def test_logits_of_weights_given_by_a_formula_stay_what_they_were() -> None:
    config = tiny_vit_gpt2_config(vision_width=48)
    ours = set_by_formula(VitGpt2(config).double()).eval()
    published = set_by_formula(VisionEncoderDecoderModel(config).double()).eval()
    pixel_values = torch.cos(torch.arange(3 * 32 * 32, dtype=torch.float64) * 0.37).view(1, 3, 32, 32)
    ids = torch.tensor([[BOS_ID, 3, 14, 15, 9, 26]])
    for logits in (logits_of(ours, pixel_values, ids), published(pixel_values, decoder_input_ids=ids).logits):
        assert logits.shape == (1, 6, VOCAB_SIZE)
        torch.testing.assert_close(
            logits[0, [0, 3, 5], :4], torch.tensor(GOLDEN, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )
