"""VGG16 and an LSTM against the published equations and table, written out here: names, features, loss, states, search."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_checks import gradients, largest_relative_difference
from torch import Tensor, nn

from raycap.decoding import search
from raycap.models.vgg_lstm import VggLstm, import_torchvision
from raycap.schema import DecodeSettings

torch.set_num_threads(1)

BOS_ID, EOS_ID, PAD_ID, VOCAB = 1, 2, 0, 20
# Simonyan and Zisserman, arXiv:1409.1556, table 1, column D; and where torchvision counts a convolution.
VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
CONVOLUTIONS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
both_modes = pytest.mark.parametrize("attention", [False, True], ids=["show_and_tell", "show_attend_and_tell"])


def tiny_config(attention: bool, /, **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "vgg_lstm",
        "vocab_size": VOCAB,
        "image_size": 64,  # a map of 4 x 4 places, 2 x 2 after the last pooling
        "embedding_size": 12,
        "hidden_size": 10,
        "attention": attention,
        "vgg_channels": [[4, 4], [6, 6], [6, 6, 6], [8, 8, 8], [8, 8, 8]],
        "vgg_fc_size": 16,
        "freeze_vision": False,
    }
    return {**config, **changes}


def tiny_model(attention: bool, *, seed: int = 0, **changes: Any) -> VggLstm:
    """In eval mode, all weights and biases far from 0, the image strong enough to matter."""
    model = VggLstm(tiny_config(attention, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.6 / (parameter[0].numel() ** 0.5) if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def images(count: int, *, seed: int = 1, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def captions(rows: int, *, padded: bool = True, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Rows "BOS words... EOS", padded on the right; lengths differ if padded. The first token carries no label."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.full((rows, 9), PAD_ID)
    labels = torch.full((rows, 9), -100)
    for row in range(rows):
        num_words = 2 + row % 5 if padded else 7
        words = torch.randint(3, VOCAB, (num_words,), generator=generator)
        text = torch.cat([torch.tensor([BOS_ID]), words, torch.tensor([EOS_ID])])
        input_ids[row, : len(text)] = text
        labels[row, 1 : len(text)] = text[1:]
    return input_ids, labels


# The published networks, restated. w: a state dict, or the parameters by name.


def restated_map(w: dict[str, Tensor], pixels: Tensor, *, last_pool: bool) -> Tensor:
    indices = iter(CONVOLUTIONS)
    for place, layer in enumerate(VGG16):
        if layer == "M":
            pixels = F.max_pool2d(pixels, 2) if last_pool or place < len(VGG16) - 1 else pixels
        else:
            n = next(indices)
            pixels = F.relu(F.conv2d(pixels, w[f"features.{n}.weight"], w[f"features.{n}.bias"], padding=1))
    return pixels


def restated_fc7(w: dict[str, Tensor], pixels: Tensor) -> Tensor:
    pooled = restated_map(w, pixels, last_pool=True)
    side = pooled.shape[-1]
    bins = [slice(i * side // 7, -(-(i + 1) * side // 7)) for i in range(7)]  # floor and ceiling: adaptive pooling
    cells = [pooled[:, :, rows, columns].mean(dim=(2, 3)) for rows in bins for columns in bins]
    hidden = torch.stack(cells, dim=2).flatten(1)
    for n in (0, 3):
        hidden = F.relu(hidden @ w[f"classifier.{n}.weight"].T + w[f"classifier.{n}.bias"])
    return hidden


def restated_cell(x: Tensor, h: Tensor, c: Tensor, w: dict[str, Tensor], suffix: str) -> tuple[Tensor, Tensor]:
    weight_ih, weight_hh, bias_ih, bias_hh = (
        w[f"lstm.{name}{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    i, f, g, o = (x @ weight_ih.T + h @ weight_hh.T + bias_ih + bias_hh).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def restated_logits(w: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """(N, L, V) of N images and one text of each."""
    attention = "key.weight" in w
    logits = []
    if attention:
        places = restated_map(w, pixels, last_pool=False).flatten(2).permute(0, 2, 1)
        mean = places.mean(1)
        h = torch.tanh(mean @ w["init_hidden.0.weight"].T + w["init_hidden.0.bias"])
        c = torch.tanh(mean @ w["init_cell.0.weight"].T + w["init_cell.0.bias"])
    else:
        first = restated_fc7(w, pixels) @ w["image_embedding.weight"].T + w["image_embedding.bias"]
        zero = first.new_zeros(len(ids), w["lstm.weight_hh_l0"].shape[1])
        h, c = restated_cell(first, zero, zero, w, "_l0")
    for n in range(ids.shape[1]):
        word = w["word_embeddings.weight"][ids[:, n]]
        if not attention:
            h, c = restated_cell(word, h, c, w, "_l0")
            logits.append(h @ w["output.vocabulary.weight"].T + w["output.vocabulary.bias"])
            continue
        keys = places @ w["key.weight"].T + w["key.bias"]
        scores = (torch.tanh(keys + (h @ w["lstm.query_weight"].T)[:, None]) * w["lstm.score_weight"]).sum(-1)
        alphas = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True)
        beta = torch.sigmoid(h @ w["lstm.beta_weight"].T + w["lstm.beta_bias"])
        context = beta * (alphas[:, :, None] * places).sum(1)
        h, c = restated_cell(torch.cat([word, context], 1), h, c, w, "")
        from_hidden = h @ w["output.hidden.weight"].T + w["output.hidden.bias"]
        from_context = context @ w["output.context.weight"].T + w["output.context.bias"]
        deep = torch.tanh(word + from_hidden + from_context)
        logits.append(deep @ w["output.vocabulary.weight"].T + w["output.vocabulary.bias"])
    return torch.stack(logits, dim=1)


def restated_loss(w: dict[str, Tensor], pixels: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_probs = restated_logits(w, pixels, ids[:, :-1]).log_softmax(-1)
    terms = [log_probs[n, at - 1, labels[n, at]] for n, at in (labels != -100).nonzero().tolist()]
    return -torch.stack(terms).sum()


def torchvision_state(channels: list[int | str], fc_size: int, *, seed: int = 3) -> dict[str, Tensor]:
    """Random weights under torchvision's 32 names of vgg16, of moderate size: the map neither vanishes nor explodes."""
    generator = torch.Generator().manual_seed(seed)
    state, width = {}, 3
    for n, out in zip(CONVOLUTIONS, [c for c in channels if c != "M"], strict=True):
        noise = torch.randn(out, width, 3, 3, generator=generator)
        state[f"features.{n}.weight"] = noise * (2 / (9 * width)) ** 0.5
        state[f"features.{n}.bias"] = 0.1 * torch.randn(out, generator=generator)
        width = out
    for n, out, read in ((0, fc_size, 49 * width), (3, fc_size, fc_size), (6, 1000, fc_size)):
        if fc_size == 4096:  # half a gigabyte: only the shape is wanted
            state[f"classifier.{n}.weight"] = torch.zeros(1).expand(out, read)
        else:
            state[f"classifier.{n}.weight"] = torch.randn(out, read, generator=generator) * (2 / read) ** 0.5
        state[f"classifier.{n}.bias"] = 0.1 * torch.randn(out, generator=generator)
    return state


TINY_CHANNELS = [4, 4, "M", 6, 6, "M", 6, 6, 6, "M", 8, 8, 8, "M", 8, 8, 8, "M"]


# VGG16


@pytest.mark.parametrize("size", [32, 64])
def test_the_published_vgg16_gives_the_conv5_3_map_of_the_published_table(size: int) -> None:
    state = torchvision_state(VGG16, 4096)
    ours = VggLstm({"vocab_size": VOCAB, "image_size": size, "attention": True}).eval()
    result = ours.load_state_dict(import_torchvision(state, attention=True), strict=False)
    assert result.unexpected_keys == []
    assert not any(name.startswith("features.") for name in result.missing_keys)
    pixel_values = images(1, size=size)
    with torch.no_grad():
        features = ours.encode_image(pixel_values).features_BTE
        expected = restated_map(state, pixel_values, last_pool=False)
    assert expected.shape == (1, 512, size // 16, size // 16)
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected.flatten(2).mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [32, 64, 224, 288])
def test_a_state_dict_of_torchvision_gives_its_fc7_vector_at_every_size(size: int) -> None:
    state = torchvision_state(TINY_CHANNELS, 16)
    ours = tiny_model(False, image_size=size)
    result = ours.load_state_dict(import_torchvision(state), strict=False)
    assert result.unexpected_keys == []
    assert not any(name.startswith(("features.", "classifier.")) for name in result.missing_keys)
    assert all(tensor is state[name] for name, tensor in import_torchvision(state).items())

    pixel_values = images(2, size=size)
    with torch.no_grad():
        features = ours.encode_image(pixel_values).features_BTE
        expected = restated_fc7(state, pixel_values)
        pooled = restated_map(state, pixel_values, last_pool=True)
    assert pooled.shape == (2, 8, size // 32, size // 32)
    assert features.shape == (2, 1, 16)
    assert expected.std() > 0.1
    torch.testing.assert_close(features[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_the_default_model_has_the_parameters_of_the_published_vgg16() -> None:
    with torch.device("meta"):
        ours = VggLstm({"vocab_size": VOCAB})
        attending = VggLstm({"vocab_size": VOCAB, "attention": True})
    vision = {n: t for n, t in ours.state_dict().items() if n.startswith(("features.", "classifier."))}
    published = {name: tensor.shape for name, tensor in torchvision_state(VGG16, 4096).items()}
    last = {name: published.pop(name) for name in ("classifier.6.weight", "classifier.6.bias")}
    assert {name: tensor.shape for name, tensor in vision.items()} == published

    features = sum(tensor.numel() for name, tensor in vision.items() if name.startswith("features."))
    assert features == 14_714_688
    assert sum(tensor.numel() for tensor in vision.values()) + sum(s.numel() for s in last.values()) == 138_357_544
    theirs = {n: t.shape for n, t in attending.state_dict().items() if n.startswith(("features.", "classifier."))}
    assert theirs == {name: shape for name, shape in published.items() if name.startswith("features.")}


@both_modes
def test_a_state_dict_of_another_network_is_refused(attention: bool) -> None:
    state = torchvision_state(TINY_CHANNELS, 16)
    lacking = {name: tensor for name, tensor in state.items() if name != "features.17.bias"}
    with pytest.raises(ValueError, match=r"1 tensors are missing and 0 unknown \(first: 'features.17.bias'\)"):
        import_torchvision(lacking, attention=attention)
    with pytest.raises(ValueError, match=r"0 tensors are missing and 1 unknown \(first: 'features.30.weight'\)"):
        import_torchvision(state | {"features.30.weight": torch.zeros(1)}, attention=attention)  # VGG19 goes on there


def test_the_convolutions_alone_are_enough_for_attention_and_not_without_it() -> None:
    state = {n: t for n, t in torchvision_state(TINY_CHANNELS, 16).items() if n.startswith("features.")}
    assert import_torchvision(state, attention=True).keys() == state.keys()
    with pytest.raises(ValueError, match=r"4 tensors are missing and 0 unknown \(first: 'classifier.0.weight'\)"):
        import_torchvision(state)


@both_modes
def test_a_frozen_vgg16_gets_no_gradient_and_the_rest_all_of_it(attention: bool) -> None:
    frozen, free = tiny_model(attention, freeze_vision=True), tiny_model(attention)
    names = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert names == {n for n, _ in free.named_parameters() if not n.startswith(("features.", "classifier."))}
    ours, theirs = (gradients(m, m(images(2), *captions(2))[0]) for m in (frozen, free))
    assert ours.keys() == names
    assert theirs.keys() == {name for name, _ in free.named_parameters()}
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


# The decoders


@both_modes
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_loss_and_every_gradient_equal_the_published_equations(
    attention: bool, padded: bool, dtype: torch.dtype, tolerance: float
) -> None:
    ours = tiny_model(attention).to(dtype)
    pixel_values, (input_ids, labels) = images(4).to(dtype), captions(4, padded=padded)
    loss, num_targets = ours(pixel_values, input_ids, labels)
    expected = restated_loss(dict(ours.named_parameters()), pixel_values, input_ids, labels)

    assert loss.dtype == dtype
    assert num_targets.dtype == torch.int64
    assert num_targets == (labels[:, 1:] != -100).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    our_gradients = gradients(ours, loss)
    assert len(our_gradients) == len(list(ours.parameters()))
    assert all(gradient.any() for gradient in our_gradients.values())
    assert largest_relative_difference(our_gradients, gradients(ours, expected)) < tolerance


@both_modes
@pytest.mark.parametrize("prompt_length", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logits_of_one_token_at_a_time_equal_the_published_equations(
    attention: bool, prompt_length: int, dtype: torch.dtype, tolerance: float
) -> None:
    ours = tiny_model(attention).to(dtype)
    pixel_values, text = images(3).to(dtype), captions(3, padded=False)[0]
    text[:, :3] = text[0, :3].clone()  # all images have the same prompt
    with torch.no_grad():
        expected_NLV = restated_logits(dict(ours.named_parameters()), pixel_values, text)
        state = ours.start(ours.encode_image(pixel_values), text[0, :prompt_length])
        steps_NLV = torch.stack([ours.step(state, text[:, i]) for i in range(prompt_length - 1, text.shape[1])], dim=1)
    assert steps_NLV.dtype == dtype
    assert (steps_NLV - expected_NLV[:, prompt_length - 1 :]).abs().max() < tolerance * expected_NLV.abs().max()


@both_modes
def test_teacher_forcing_loses_what_one_token_at_a_time_loses(attention: bool) -> None:
    ours = tiny_model(attention)
    input_ids, labels = captions(4)
    image = ours.encode_image(images(4))
    state = ours.start(image, input_ids[0, :1])
    by_steps = 0.0
    for i in range(input_ids.shape[1] - 1):
        logits_NV = ours.step(state, input_ids[:, i])
        by_steps += F.cross_entropy(logits_NV, labels[:, i + 1], reduction="sum", ignore_index=-100).item()
    assert ours.loss(image, input_ids, labels)[0].item() == pytest.approx(by_steps, rel=1e-6)


@both_modes
def test_the_loss_sees_the_padding_of_no_row(attention: bool) -> None:
    ours = tiny_model(attention)
    input_ids, labels = captions(4)
    other_padding = torch.where(input_ids == PAD_ID, 9, input_ids)
    assert torch.equal(ours(images(4), input_ids, labels)[0], ours(images(4), other_padding, labels)[0])
    longer = [F.pad(input_ids, (0, 3), value=7), F.pad(labels, (0, 3), value=-100)]
    assert ours(images(4), *longer)[0].item() == pytest.approx(ours(images(4), input_ids, labels)[0].item(), rel=1e-6)


@both_modes
def test_label_smoothing_is_that_of_torch(attention: bool) -> None:
    ours = tiny_model(attention, label_smoothing=0.1)
    input_ids, labels = captions(4)
    logits_NLV = restated_logits(dict(ours.named_parameters()), images(4), input_ids[:, :-1])
    expected = F.cross_entropy(logits_NLV.mT, labels[:, 1:], label_smoothing=0.1, reduction="sum")
    assert ours(images(4), input_ids, labels)[0].item() == pytest.approx(expected.item(), rel=1e-6)


@both_modes
def test_the_image_matters_to_the_loss(attention: bool) -> None:
    ours = tiny_model(attention)
    losses = [ours(images(4, seed=seed), *captions(4))[0].item() for seed in (1, 9)]
    assert abs(losses[0] - losses[1]) > 0.01


@both_modes
def test_captions_that_share_an_image_equal_one_row_per_image(attention: bool) -> None:
    ours = tiny_model(attention).double()
    pixel_values, (input_ids, labels) = images(3).double(), captions(6)
    shared, num_targets = ours(pixel_values, input_ids, labels)
    shared_gradients = gradients(ours, shared)
    alone, num_targets_alone = ours(pixel_values.repeat_interleave(2, dim=0), input_ids, labels)

    assert num_targets == num_targets_alone
    assert shared.item() == pytest.approx(alone.item(), rel=1e-12)
    assert largest_relative_difference(shared_gradients, gradients(ours, alone)) < 1e-10


@both_modes
def test_a_batch_whose_images_differ_in_captions_is_refused(attention: bool) -> None:
    with pytest.raises(ValueError, match="got 3 rows for 2 images"):
        tiny_model(attention)(images(2), *captions(3))


@both_modes
def test_rows_without_targets_add_nothing_and_a_batch_of_them_gives_zero_gradients_everywhere(attention: bool) -> None:
    ours = tiny_model(attention)
    pixel_values, (input_ids, labels) = images(4), captions(4)
    half = labels.clone()
    half[2:] = -100
    loss, num_targets = ours(pixel_values, input_ids, half)
    expected, expected_targets = ours(pixel_values[:2], input_ids[:2], labels[:2])
    assert num_targets == expected_targets
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    for model in (ours.train(), VggLstm(tiny_config(attention, freeze_vision=True)).train()):
        # The shortest text there is: one position, and nothing to predict in it.
        loss, num_targets = model(pixel_values, input_ids[:, :2], torch.full_like(labels[:, :2], -100))
        assert (loss.item(), int(num_targets)) == (0.0, 0)
        zeros = gradients(model, loss)
        assert zeros.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(torch.equal(g, torch.zeros_like(g)) for g in zeros.values())


@both_modes
def test_dropout_is_off_in_eval_and_on_in_training_but_not_in_a_frozen_vgg16(attention: bool) -> None:
    ours = VggLstm(tiny_config(attention, dropout=0.5))
    pixel_values, (input_ids, labels) = images(2), captions(2)
    assert torch.equal(*(ours.eval()(pixel_values, input_ids, labels)[0] for _ in range(2)))
    assert not torch.equal(*(ours.train()(pixel_values, input_ids, labels)[0] for _ in range(2)))
    none = VggLstm(tiny_config(attention, dropout=0))
    assert torch.equal(*(none.train()(pixel_values, input_ids, labels)[0] for _ in range(2)))

    frozen = tiny_model(attention, freeze_vision=True).train()
    assert torch.equal(*(frozen.encode_image(pixel_values).features_BTE for _ in range(2)))
    if not attention:  # VGG16's own dropout is between fc6 and fc7
        free = tiny_model(attention).train()
        assert not torch.equal(*(free.encode_image(pixel_values).features_BTE for _ in range(2)))


@both_modes
def test_dropout_is_where_the_published_models_have_it(attention: bool) -> None:
    ours = tiny_model(attention).train()
    dropped: list[tuple[int, ...]] = []
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _module, _inputs, output: dropped.append(tuple(output.shape)))
    input_ids, labels = captions(4)
    _, num_targets = ours(images(2), input_ids, labels)
    M, L = int(num_targets), input_ids.shape[1] - 1
    assert (
        dropped
        == {
            # between fc6 and fc7; what the LSTM reads of the image, and of the words; what it gives, where there is a target
            False: [(2, 16), (2, 1, 12), (4, L, 12), (M, 10)],
            True: [(M, 10), (M, 12)],  # what the LSTM gives; before the last layer
        }[attention]
    )


@both_modes
def test_bfloat16_weights_and_autocast_give_a_float32_loss_and_float32_logits(attention: bool) -> None:
    expected = tiny_model(attention)(images(2), *captions(2))[0].item()

    def check(ours: VggLstm) -> None:
        loss = ours(images(2), *captions(2))[0]
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=0.02)
        assert len(gradients(ours, loss)) == len(list(ours.parameters()))
        state = ours.start(ours.encode_image(images(2)), torch.tensor([BOS_ID, 5]), beams=2)
        for _ in range(2):
            assert ours.step(state, torch.tensor([5] * 4)).dtype == torch.float32

    check(tiny_model(attention).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        check(tiny_model(attention))


# States


@both_modes
def test_beams_go_on_from_the_rows_that_reorder_names(attention: bool) -> None:
    ours = tiny_model(attention)
    pixel_values, prompt = images(2), torch.tensor([BOS_ID, 7, 8])
    state = ours.start(ours.encode_image(pixel_values), prompt, beams=2)
    assert state.num_rows == 4
    ours.step(state, prompt[-1].expand(4))
    ours.step(state, torch.tensor([10, 11, 12, 13]))
    state.reorder(torch.tensor([1, 1, 3, 2]))
    logits_NV = ours.step(state, torch.tensor([3, 4, 5, 6]))

    texts = torch.tensor([[BOS_ID, 7, 8, *tail] for tail in ([11, 3], [11, 4], [13, 5], [12, 6])])
    with torch.no_grad():
        expected = restated_logits(ours.state_dict(), pixel_values.repeat_interleave(2, dim=0), texts)
    torch.testing.assert_close(logits_NV, expected[:, -1], rtol=1e-5, atol=1e-5)


@both_modes
@pytest.mark.parametrize("prompt", [[BOS_ID], [BOS_ID, 7, 8]])
def test_images_that_are_kept_go_on_with_all_their_beams(attention: bool, prompt: list[int]) -> None:
    ours = tiny_model(attention)
    pixel_values, prompt_ids = images(3), torch.tensor(prompt)
    image = ours.encode_image(pixel_values)
    state = ours.start(image, prompt_ids, beams=2)
    state.keep(torch.tensor([2, 0, 1]))
    ours.step(state, prompt_ids[-1].expand(6))
    state.keep(torch.tensor([2, 0]))  # images 1 and 2
    assert state.num_rows == 4
    logits_NV = ours.step(state, torch.tensor([3, 4, 5, 6]))

    texts = torch.tensor([[*prompt, last] for last in (3, 4, 5, 6)])
    with torch.no_grad():
        expected = restated_logits(ours.state_dict(), pixel_values[[1, 1, 2, 2]], texts)
    torch.testing.assert_close(logits_NV, expected[:, -1], rtol=1e-5, atol=1e-5)
    assert len(image.features_BTE) == 3


def test_places_of_an_image_are_projected_once_and_never_copied_per_beam() -> None:
    ours = tiny_model(True)
    rows = []
    ours.key.register_forward_hook(lambda _module, _inputs, output: rows.append(tuple(output.shape)))
    image = ours.encode_image(images(2))
    state = ours.start(image, torch.tensor([BOS_ID, 7]), beams=3)
    for _ in range(4):
        ours.step(state, torch.full((6,), 9))
    ours.loss(image, *captions(6))
    assert rows == [(2, 16, 8), (2, 16, 8)]  # of the search, and of the loss
    assert state.image.features_BTE is image.features_BTE
    assert image.keys_BTA is None


@both_modes
def test_a_loss_after_decoding_from_the_same_image_state_has_all_its_gradients(attention: bool) -> None:
    ours = tiny_model(attention)
    input_ids, labels = captions(2)
    expected = gradients(ours, ours(images(2), input_ids, labels)[0])
    image = ours.encode_image(images(2))
    logits = ours.step(ours.start(image, torch.tensor([BOS_ID, 7])), torch.tensor([8, 8]))
    assert not logits.requires_grad
    assert largest_relative_difference(gradients(ours, ours.loss(image, input_ids, labels)[0]), expected) < 1e-6


@both_modes
def test_parameters_are_used_only_inside_the_module_that_owns_them(attention: bool) -> None:
    # As ZeRO-3 does: a module's own parameters hold their values from its pre-forward hook to its forward hook only.
    ours = tiny_model(attention)
    pixel_values, (input_ids, labels) = images(2), captions(4)

    @torch.no_grad()
    def run() -> list[Tensor]:
        state = ours.start(ours.encode_image(pixel_values), torch.tensor([BOS_ID, 7]))
        return [ours(pixel_values, input_ids, labels)[0], ours.step(state, torch.tensor([8, 8]))]

    expected = run()
    weights = {parameter: parameter.detach().clone() for parameter in ours.parameters()}

    @torch.no_grad()
    def gather(module: nn.Module, _inputs: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.copy_(weights[parameter])

    @torch.no_grad()
    def release(module: nn.Module, _inputs: object, _output: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.fill_(torch.nan)

    for module in ours.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    with torch.no_grad():
        for parameter in weights:
            parameter.fill_(torch.nan)
    for result, value in zip(run(), expected, strict=True):
        assert torch.equal(result, value)


@both_modes
def test_modules_are_called_equally_often_for_short_and_long_texts(attention: bool) -> None:
    # Ranks read texts of different lengths, and under ZeRO-3 every call of a module is a gathering of all ranks.
    ours = tiny_model(attention)
    calls: list[str] = []
    for name, module in ours.named_modules():
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: calls.append(name))
    input_ids, labels = captions(2, padded=False)
    ours(images(2), input_ids, labels)
    long, calls[:] = list(calls), []
    ours(images(2), input_ids[:, :2], torch.full_like(labels[:, :2], -100))
    assert calls == long


# Search


def every_caption(model: VggLstm, pixels: Tensor, length: int, penalty: float) -> list[tuple[float, float, tuple]]:
    """(rank score, mean log-probability, ids without the end token) of each text that a search may return, best first."""
    vocab, eos_id = 5, 4
    found = []
    for n in range(length + 1):
        words = torch.tensor(list(itertools.product(range(vocab - 1), repeat=n)), dtype=torch.long)
        texts = F.pad(words, (0, 1), value=eos_id) if n < length else words
        with torch.no_grad():
            logits = restated_logits(
                model.state_dict(), pixels.expand(len(texts), -1, -1, -1), F.pad(texts[:, :-1], (1, 0), value=BOS_ID)
            )
        totals = logits.log_softmax(-1).gather(2, texts[:, :, None]).sum((1, 2)).tolist()
        num_tokens = texts.shape[1]
        for total, row in zip(totals, words.tolist(), strict=True):
            found.append((total / num_tokens**penalty, total / num_tokens, tuple(row)))
    return sorted(found, reverse=True)


@both_modes
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_beam_as_wide_as_all_texts_finds_them_all_in_the_order_of_their_score(
    attention: bool, penalty: float
) -> None:
    ours = tiny_model(attention, seed=1, vocab_size=5, hidden_size=6, embedding_size=6, image_size=32)
    ours, pixel_values = ours.double(), images(2, size=32).double()
    expected = [every_caption(ours, pixel_values[i : i + 1], 4, penalty) for i in range(2)]
    num_texts = 1 + 4 + 4**2 + 4**3 + 4**4
    assert [len(texts) for texts in expected] == [num_texts, num_texts]

    settings = DecodeSettings(max_new_tokens=4, num_beams=num_texts, length_penalty=penalty)
    image = ours.encode_image(pixel_values)
    found = search(ours, image, torch.tensor([BOS_ID]), eos_id=4, settings=settings)
    for ours_of_image, all_of_image in zip(found, expected, strict=True):
        assert [decoded.ids for decoded in ours_of_image] == [words for _, _, words in all_of_image]
        scores = [mean for _, mean, _ in all_of_image]
        assert [decoded.score for decoded in ours_of_image] == pytest.approx(scores, abs=1e-9)

    if penalty == 1.0:
        greedy = search(ours, image, torch.tensor([BOS_ID]), eos_id=4, settings=DecodeSettings(max_new_tokens=4))
        assert all(best.score > single.score - 1e-12 for (best, *_), (single,) in zip(found, greedy, strict=True))
        assert found[0][0].score > greedy[0][0].score  # of these weights, so that the width is not for nothing


@both_modes
def test_greedy_search_takes_the_likeliest_token_at_every_step(attention: bool) -> None:
    settings = DecodeSettings(max_new_tokens=4)
    lengths = set()
    for seed in range(5):
        ours = tiny_model(attention, seed=seed, vocab_size=5, hidden_size=6, embedding_size=6)
        pixel_values = 3 * images(3)
        found = search(ours, ours.encode_image(pixel_values), torch.tensor([BOS_ID]), eos_id=4, settings=settings)
        for i, (decoded,) in enumerate(found):
            text, total = [BOS_ID], 0.0
            while len(text) < 5 and text[-1] != 4:
                with torch.no_grad():
                    logits = restated_logits(ours.state_dict(), pixel_values[i : i + 1], torch.tensor([text]))[0, -1]
                total += logits.log_softmax(-1).max().item()
                text.append(int(logits.argmax()))
            assert decoded.ids == tuple(token for token in text[1:] if token != 4)
            assert decoded.score == pytest.approx(total / (len(text) - 1), abs=1e-5)
            lengths.add(len(decoded.ids))
    assert {0, 4} <= lengths  # some captions end by themselves, some at the limit


# Weights


@both_modes
def test_logits_of_weights_made_by_a_formula_are_these(attention: bool) -> None:
    ours = VggLstm(tiny_config(attention, vocab_size=6)).eval().double()
    with torch.no_grad():
        for n, (_, parameter) in enumerate(sorted(ours.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + n).view_as(parameter)
            parameter.copy_(wave * (2 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.5))
        pixel_values = torch.cos(torch.arange(3 * 64 * 64, dtype=torch.float64) * 0.37).view(1, 3, 64, 64)
        state = ours.start(ours.encode_image(pixel_values), torch.tensor([1, 3, 5]))
        logits = ours.step(state, torch.tensor([5]))[0].tolist()
    expected = {
        False: [-0.402539790449, 0.144948918853, 0.322900487809, -0.177567223658, -0.262696611029, 0.186721215756],
        True: [-1.809926095989, 2.925746651700, 1.781420620085, -2.812566903518, -1.758789502256, 2.664977229607],
    }[attention]
    assert logits == pytest.approx(expected, abs=1e-9)


@both_modes
def test_fresh_weights_are_drawn_as_their_sources_draw_them(attention: bool) -> None:
    torch.manual_seed(0)
    channels = [[32, 32], [64, 64], [64, 64, 64], [64, 64, 64], [64, 64, 64]]
    sizes = {"vgg_channels": channels, "vgg_fc_size": 128, "hidden_size": 64, "embedding_size": 64, "vocab_size": 300}
    for name, weight in VggLstm(tiny_config(attention, **sizes)).named_parameters():
        if "bias" in name:
            expected = torch.zeros_like(weight)
            if "bias_ih" in name:
                expected[64:128] = 1.0  # the forget gate is the second of four
            assert torch.equal(weight, expected), name
            continue
        if name.startswith("features."):
            std = (2 / (9 * weight.shape[0])) ** 0.5  # He et al., by the channels that come out
        elif name.startswith("classifier."):
            std = 0.01
        else:
            std = 0.08 / 3**0.5
            assert weight.abs().max() <= 0.08, name
        assert weight.mean().abs() < 5 * std / weight.numel() ** 0.5, name
        assert float(weight.detach().std() / std) == pytest.approx(1, abs=5 / weight.numel() ** 0.5), name


@both_modes
def test_four_captions_are_learnt_by_heart_from_a_frozen_vgg16(attention: bool) -> None:
    torch.manual_seed(0)
    ours = VggLstm(
        tiny_config(attention, image_size=32, freeze_vision=True, hidden_size=32, embedding_size=32, dropout=0)
    )
    published = torchvision_state(TINY_CHANNELS, 16)
    ours.load_state_dict(import_torchvision(published, attention=attention), strict=False)
    fields = 2 * torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))  # noise would look the same to it
    pixel_values, (input_ids, labels) = F.interpolate(fields, scale_factor=16), captions(4)
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=0.02)
    for _ in range(200):
        loss, num_targets = ours.train()(pixel_values, input_ids, labels)
        optimizer.zero_grad()
        (loss / num_targets).backward()
        optimizer.step()

    image = ours.eval().encode_image(pixel_values)
    loss, num_targets = ours.loss(image, input_ids, labels)
    assert loss / num_targets < 0.05
    for num_beams in (1, 3):
        settings = DecodeSettings(max_new_tokens=9, num_beams=num_beams)
        found = search(ours, image, torch.tensor([BOS_ID]), eos_id=EOS_ID, settings=settings)
        for (best, *_), row in zip(found, input_ids.tolist(), strict=True):
            assert list(best.ids) == row[1 : row.index(EOS_ID)]


# Refusals


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 0}, "vocab_size is 0 in a vgg_lstm config; give a whole number from 1"),
        ({"hidden_size": 8.0}, "hidden_size is 8.0"),
        ({"embedding_size": True}, "embedding_size is True"),
        ({"vgg_fc_size": None}, "vgg_fc_size is None"),
        ({"image_size": 100}, "image_size is 100 in a vgg_lstm config; give a multiple of 32"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"dropout": "0.5"}, "dropout is '0.5'"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"attention": "soft"}, "attention is 'soft' in a vgg_lstm config; give true or false"),
        ({"freeze_vision": 1}, "freeze_vision is 1"),
        ({"vgg_channels": [[4], [4], [4], [4]]}, r"vgg_channels is \[\[4\], \[4\], \[4\], \[4\]\]"),
        ({"vgg_channels": [[4], [4], [], [4], [4]]}, "vgg_channels is .* five lists of whole numbers from 1"),
        ({"vgg_channels": [64, 64, "M", 128, 128]}, "vgg_channels is"),
        ({"model_type": "vgg"}, "model_type is 'vgg' in a vgg_lstm config; give 'vgg_lstm'"),
        ({"num_layers": 2}, "a vgg_lstm config has no field 'num_layers'; its fields are vocab_size, image_size"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_the_name_of_its_field(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        VggLstm(tiny_config(False, **changes))


def test_a_config_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="a vgg_lstm config needs vocab_size"):
        VggLstm({"model_type": "vgg_lstm"})


def test_the_keys_that_a_checkpoint_folder_adds_are_no_fields() -> None:
    VggLstm(tiny_config(True) | {"architectures": ["VggLstm"]})


@both_modes
def test_images_of_another_size_are_refused(attention: bool) -> None:
    with pytest.raises(ValueError, match=r"takes pixel_values \(images, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        tiny_model(attention).encode_image(torch.zeros(1, 3, 32, 32))
