"""Our CLIP-GPT2 against ClipCap's formula, restated here on its original names, and transformers' GPT2LMHeadModel."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_checks import empty_parameters_outside_their_module, gradients, largest_relative_difference
from tiny_clip_gpt2 import BOS_ID, EOS_ID, FEATURES, captions, images, tiny_clip_gpt2, tiny_config
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, GPT2Config, GPT2LMHeadModel

from raycap.decoding import search
from raycap.decoding.protocol import CaptionModel, DecodeState
from raycap.models.clip_gpt2 import TIED_NAMES, ClipGpt2, clipcap_layout, import_clipcap
from raycap.schema import DecodeSettings

torch.set_num_threads(1)

PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-12)]
NAMES = ("mlp", "transformer", "linear_tanh")


def clipcap_prefix(weights: Mapping[str, Tensor], vector: Tensor, num_heads: int = 8) -> Tensor:
    """The visual tokens of ClipCap's MLP and TransformerMapper (train.py there), by the names of its state dict."""
    width = weights["gpt.transformer.wte.weight"].shape[1]

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, weights[f"clip_project.{name}.weight"], weights.get(f"clip_project.{name}.bias"))

    if "clip_project.prefix_const" not in weights:
        hidden = linear("model.0", vector).tanh()
        flat = linear("model.2", hidden) if "clip_project.model.2.weight" in weights else hidden
        return flat.view(len(vector), -1, width)

    constant = weights["clip_project.prefix_const"]
    x = linear("linear", vector).view(len(vector), -1, width)
    clip_length = x.shape[1]
    x = torch.cat([x, constant.unsqueeze(0).expand(len(vector), *constant.shape)], dim=1)
    b, n, _ = x.shape
    layer = 0
    while f"clip_project.transformer.layers.{layer}.norm1.weight" in weights:
        name = f"transformer.layers.{layer}"

        def norm(number: int, value: Tensor, name: str = name) -> Tensor:
            own = f"clip_project.{name}.norm{number}"
            return F.layer_norm(value, (width,), weights[f"{own}.weight"], weights[f"{own}.bias"])

        normed = norm(1, x)
        queries = linear(f"{name}.attn.to_queries", normed).reshape(b, n, num_heads, width // num_heads)
        both = linear(f"{name}.attn.to_keys_values", normed).reshape(b, n, 2, num_heads, width // num_heads)
        scores = torch.einsum("bnhd,bmhd->bnmh", queries, both[:, :, 0]) * (width // num_heads) ** -0.5
        mixed = torch.einsum("bnmh,bmhd->bnhd", scores.softmax(dim=2), both[:, :, 1]).reshape(b, n, width)
        x = x + linear(f"{name}.attn.project", mixed)
        x = x + linear(f"{name}.mlp.fc2", linear(f"{name}.mlp.fc1", norm(2, x)).relu())
        layer += 1
    assert layer > 0
    return x[:, clip_length:]


class ClipCap:
    """The formula, with transformers' own CLIP and GPT-2 around it, on the weights of one of ours."""

    def __init__(self, ours: ClipGpt2, config: dict[str, Any]) -> None:
        dtype = next(ours.parameters()).dtype
        self.vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**config["vision_config"])).eval().to(dtype)
        self.gpt = GPT2LMHeadModel(GPT2Config(**config["text_config"])).eval().to(dtype)
        self.vision.load_state_dict(_part(ours.state_dict(), "vision_tower."))
        self.gpt.load_state_dict(_part(ours.state_dict(), "gpt."))
        self.weights = {name: t.clone() for name, t in ours.state_dict().items() if name.startswith("clip_project.")}
        for tensor in self.weights.values():
            tensor.requires_grad_()

    def prefix(self, pixel_values: Tensor) -> Tensor:
        gpt = {f"gpt.{name}": parameter for name, parameter in self.gpt.named_parameters()}
        return clipcap_prefix(gpt | self.weights, self.vision(pixel_values).image_embeds)

    def logits(self, pixel_values: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of the token behind each position of input_ids, whose first token is not read. One row an image."""
        prefix = self.prefix(pixel_values)
        embeddings = torch.cat([prefix, self.gpt.transformer.wte(input_ids[:, 1:])], dim=1)
        if mask is not None:
            mask = torch.cat([mask.new_ones(prefix.shape[:2]), mask[:, 1:]], dim=1)
        output = self.gpt(inputs_embeds=embeddings, attention_mask=mask)
        return output.logits[:, prefix.shape[1] - 1 :]

    def gradients(self) -> dict[str, Tensor]:
        named = {f"vision_tower.{name}": p for name, p in self.vision.named_parameters()}
        named |= {f"gpt.{name}": p for name, p in self.gpt.named_parameters()} | self.weights
        return {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "same length"])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["fp32", "fp64"])
@pytest.mark.parametrize("mapper", NAMES)
def test_loss_and_every_gradient_equal_clipcaps_formula(
    mapper: str, dtype: torch.dtype, tolerance: float, padded: bool
) -> None:
    changes = {"freeze_vision": False}
    ours = tiny_clip_gpt2(mapper, **changes).to(dtype)
    clipcap = ClipCap(ours, tiny_config(mapper))
    pixel_values, (input_ids, labels) = images(3).to(dtype), captions(6, same_length=not padded)
    assert bool((labels[:, 3:] == -100).any()) == padded

    loss_sum, num_targets = ours(pixel_values, input_ids, labels)

    # ClipCap has one image a row, and masks the padding; its end token is our padding token.
    mask = torch.ones_like(labels)
    mask[:, 3:] = labels[:, 3:] != -100
    logits = clipcap.logits(pixel_values.repeat_interleave(2, dim=0), input_ids, mask)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected.backward()

    assert loss_sum.dtype == dtype
    assert num_targets.dtype == torch.int64
    assert num_targets == (labels != -100).sum()
    assert loss_sum.item() == pytest.approx(expected.item(), rel=tolerance)
    our_gradients = gradients(ours, loss_sum)
    assert len(our_gradients) == len(list(ours.parameters()))
    assert largest_relative_difference(our_gradients, clipcap.gradients()) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["fp32", "fp64"])
@pytest.mark.parametrize("mapper", NAMES)
def test_one_token_at_a_time_gives_the_logits_of_clipcaps_whole_text(
    mapper: str, dtype: torch.dtype, tolerance: float
) -> None:
    ours = tiny_clip_gpt2(mapper).to(dtype)
    clipcap = ClipCap(ours, tiny_config(mapper))
    pixel_values = images(3).to(dtype)
    text = torch.randint(4, BOS_ID, (3, 45), generator=torch.Generator().manual_seed(3))  # the cache has to grow
    text[:, 1:4] = torch.tensor([7, 8, 9])
    text[:, 0] = BOS_ID
    with torch.no_grad():
        expected_NLV = clipcap.logits(pixel_values, text)
        image = ours.encode_image(pixel_values)
        for num_prompt in (1, 2, 4):
            state = ours.start(image, text[0, :num_prompt])
            steps_NLV = torch.stack([ours.step(state, text[:, i]) for i in range(num_prompt - 1, 45)], dim=1)
            difference = (steps_NLV - expected_NLV[:, num_prompt - 1 :]).abs().max()
            assert difference < tolerance * expected_NLV.abs().max()


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
def test_weights_that_clipcap_saved_import_without_a_missing_and_without_an_unexpected_name(mapper: str) -> None:
    P, C, E, D = 6, 3, 24, 32
    shapes = {"model.0": (P * D // 2, E), "model.2": (P * D, P * D // 2)}
    if mapper == "transformer":
        shapes = {"linear": (C * D, E)}
        for n in range(3):
            names = {"attn.to_queries": (D, D), "attn.to_keys_values": (2 * D, D), "attn.project": (D, D)}
            names |= {"mlp.fc1": (2 * D, D), "mlp.fc2": (D, 2 * D), "norm1": (D,), "norm2": (D,)}
            shapes |= {f"transformer.layers.{n}.{name}": shape for name, shape in names.items()}
    saved = {f"clip_project.{name}.weight": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    saved |= {
        f"clip_project.{name}.bias": 0.3 * torch.randn(shape[0])
        for name, shape in shapes.items()
        if not name.endswith(("to_queries", "to_keys_values"))
    }
    if mapper == "transformer":
        saved["clip_project.prefix_const"] = torch.randn(P, D)
    gpt = GPT2LMHeadModel(GPT2Config(**tiny_config()["text_config"]))
    saved |= {f"gpt.{name}": tensor for name, tensor in gpt.state_dict().items()}
    masks = {}
    for n in range(3):  # as transformers saved them when ClipCap was published
        masks[f"gpt.transformer.h.{n}.attn.bias"] = torch.ones(64, 64).tril()
        masks[f"gpt.transformer.h.{n}.attn.masked_bias"] = torch.tensor(-1e4)

    weights = import_clipcap(saved | masks)
    layout = clipcap_layout(weights)
    ours = ClipGpt2(tiny_config(**layout)).eval()
    found = ours.load_state_dict(weights, strict=False)

    only_transformer = {"clip_length": C, "num_mapper_layers": 3} if mapper == "transformer" else {}
    assert layout == {"mapper": mapper, "prefix_length": P, **only_transformer}
    assert found.unexpected_keys == []
    assert {name.partition(".")[0] for name in found.missing_keys} == {"vision_tower"}
    vector = torch.randn(2, E)
    with torch.no_grad():
        torch.testing.assert_close(ours.clip_project(vector), clipcap_prefix(saved, vector), rtol=1e-5, atol=1e-5)


def test_weights_that_are_not_clipcaps_are_refused_by_name() -> None:
    embeddings = {"gpt.transformer.wte.weight": torch.ones(60, 32)}
    with pytest.raises(ValueError, match=r"'visual\.proj' is no part of it"):
        import_clipcap({**embeddings, "visual.proj": torch.ones(1)})
    with pytest.raises(ValueError, match=r"they have no gpt\.transformer\.wte\.weight"):
        import_clipcap({"clip_project.model.0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="a mapper of a single linear layer"):
        import_clipcap({**embeddings, "clip_project.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"gpt\.lm_head\.weight differs from gpt\.transformer\.wte\.weight"):
        import_clipcap({**embeddings, "gpt.lm_head.weight": torch.zeros(60, 32)})
    with pytest.raises(ValueError, match="no mapper of ClipCap's"):
        clipcap_layout(embeddings)


@pytest.mark.parametrize(("mapper", "millions"), [("mlp", 31.5), ("transformer", 41.7)])
def test_the_published_mappers_have_the_published_numbers_of_parameters(mapper: str, millions: float) -> None:
    with torch.device("meta"):
        model = ClipGpt2({"mapper": mapper, "text_config": {"n_layer": 1}, "vision_config": None})
    count = sum(parameter.numel() for parameter in model.clip_project.parameters())
    assert round(count / 1e6, 1) == millions
    assert model.gpt.transformer.wte.weight.shape == (50257, 768)


def reference_vector(tower: str, model: ClipGpt2, pixel_values: Tensor) -> Tensor:
    """The vector each tower is documented to give, by a model that transformers makes on its own."""
    from transformers import Dinov2Model, SiglipVisionModel, ViTModel

    weights, config = model.vision_tower.state_dict(), model.vision_tower.config
    match tower:
        case "clip_vision_model":
            published: Any = CLIPVisionModelWithProjection(config)
            name = "image_embeds"
        case "siglip_vision_model":
            published, name = SiglipVisionModel(config), "pooler_output"
        case "dinov2":
            published, name = Dinov2Model(config), "pooler_output"  # documented there: [CLS] behind the LayerNorm
        case _:
            published, name = ViTModel(config), ""
            weights = {**published.state_dict(), **weights}  # its pooler is left out of ours
    published.load_state_dict(weights)
    output = published.eval()(pixel_values)
    return output[name] if name else output.last_hidden_state[:, 0]


@pytest.mark.parametrize("tower", FEATURES)
def test_each_vision_tower_gives_its_documented_vector_once_per_image(tower: str) -> None:
    ours = tiny_clip_gpt2(tower=tower, freeze_vision=False)
    vectors = []
    ours.clip_project.register_forward_pre_hook(lambda _module, inputs: vectors.append(inputs[0]))
    loss, _ = ours(images(2), *captions(4))
    (vector,) = vectors
    assert vector.shape == (2, FEATURES[tower])
    torch.testing.assert_close(vector, reference_vector(tower, ours, images(2)))
    assert ours.vision_tower.config._attn_implementation == "sdpa"
    without = {name for name, _ in ours.named_parameters()} - gradients(ours, loss).keys()
    assert without == ({"vision_tower.embeddings.mask_token"} if tower == "dinov2" else set())
    assert not any(ours.get_parameter(name).requires_grad for name in without)


def test_a_normalized_prefix_is_made_of_the_vector_divided_by_its_norm() -> None:
    plain, normalized = tiny_clip_gpt2(), tiny_clip_gpt2(normalize_prefix=True)
    vector = plain.vision_tower(images(2)).image_embeds
    expected = plain.clip_project(vector / vector.pow(2).sum(1, keepdim=True).sqrt())
    torch.testing.assert_close(normalized.encode_image(images(2)).embeddings_BPD, expected)
    assert not torch.allclose(plain.encode_image(images(2)).embeddings_BPD, expected, atol=0.1)


def test_clip_gpt2_fits_the_protocol() -> None:
    ours = tiny_clip_gpt2()
    model: CaptionModel = ours
    state: DecodeState = model.start(model.encode_image(images(2)), torch.tensor([BOS_ID]), beams=2)
    assert state.num_rows == 4


def settings_of_transformers(num_beams: int) -> dict[str, Any]:
    return {"max_new_tokens": 12, "num_beams": num_beams, "do_sample": False, "eos_token_id": EOS_ID, "pad_token_id": 0}


@pytest.mark.parametrize("prompt", [[BOS_ID], [BOS_ID, 7], [BOS_ID, 7, 8, 9]], ids=["no prompt", "one", "three"])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(("mapper", "seed"), [("linear_tanh", 0), ("mlp", 3), ("transformer", 2)])
def test_captions_equal_those_of_transformers_generate(
    mapper: str, seed: int, num_beams: int, prompt: list[int]
) -> None:
    ours = tiny_clip_gpt2(mapper, seed=seed).double()  # so that no near tie is decided by rounding
    clipcap = ClipCap(ours, tiny_config(mapper))
    pixel_values, prompt_ids = images(16).double(), torch.tensor(prompt)
    with torch.no_grad():
        settings = DecodeSettings(max_new_tokens=12, num_beams=num_beams)
        found = search(ours, ours.encode_image(pixel_values), prompt_ids, eos_id=EOS_ID, settings=settings)
        text = clipcap.gpt.transformer.wte(prompt_ids[1:].expand(16, -1))
        generated = clipcap.gpt.generate(
            inputs_embeds=torch.cat([clipcap.prefix(pixel_values), text], dim=1),
            attention_mask=torch.ones(16, 5 + len(prompt) - 1, dtype=torch.int64),
            **settings_of_transformers(num_beams),
        )
    texts = [[*row.tolist(), EOS_ID] for row in generated]
    assert [list(best[0].ids) for best in found] == [text[: text.index(EOS_ID)] for text in texts]
    assert len({best[0].ids for best in found}) > 6  # of 16 images


def test_beams_go_on_from_the_rows_that_reorder_names() -> None:
    ours = tiny_clip_gpt2()
    clipcap = ClipCap(ours, tiny_config())
    pixel_values, prompt = images(2), torch.tensor([BOS_ID, 7, 8])
    image = ours.encode_image(pixel_values)
    state = ours.start(image, prompt, beams=2)
    assert state.num_rows == 4
    assert state.image is image
    ours.step(state, prompt[-1].expand(4))
    ours.step(state, torch.tensor([10, 11, 12, 13]))
    state.reorder(torch.tensor([1, 1, 3, 2]))
    logits_NV = ours.step(state, torch.tensor([20, 21, 22, 23]))

    texts = torch.tensor([[BOS_ID, 7, 8, *tail] for tail in ([11, 20], [11, 21], [13, 22], [12, 23])])
    with torch.no_grad():
        expected_NV = clipcap.logits(pixel_values.repeat_interleave(2, dim=0), texts)[:, -1]
    torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [[BOS_ID], [BOS_ID, 7], [BOS_ID, 7, 8]])
def test_images_that_are_kept_go_on_with_all_their_beams(prompt: list[int]) -> None:
    ours = tiny_clip_gpt2()
    clipcap = ClipCap(ours, tiny_config())
    pixel_values, prompt_ids = images(3), torch.tensor(prompt)
    image = ours.encode_image(pixel_values)
    state = ours.start(image, prompt_ids, beams=2)
    state.keep(torch.tensor([2, 0, 1]))  # before the first step
    first_NV = ours.step(state, prompt_ids[-1].expand(6))
    state.keep(torch.tensor([2, 0]))  # images 1 and 2
    assert state.num_rows == 4
    logits_NV = ours.step(state, torch.tensor([20, 21, 22, 23]))

    texts = torch.tensor([[*prompt, last] for last in (20, 21, 22, 23)])
    with torch.no_grad():
        expected_first_NV = clipcap.logits(pixel_values[[2, 2, 0, 0, 1, 1]], prompt_ids.expand(6, -1))[:, -1]
        expected_NV = clipcap.logits(pixel_values[[1, 1, 2, 2]], texts)[:, -1]
    torch.testing.assert_close(first_NV, expected_first_NV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-5, atol=1e-5)
    assert image.num_images == 3


def test_the_image_and_its_visual_tokens_are_read_once_whatever_is_asked_of_them() -> None:
    ours = tiny_clip_gpt2()
    rows: dict[str, list[int]] = {"vision_tower": [], "clip_project": [], "gpt": []}
    for name in ("vision_tower", "clip_project"):
        ours.get_submodule(name).register_forward_hook(lambda *_, name=name: rows[name].append(2))
    ours.gpt.register_forward_hook(lambda _module, inputs, _output: rows["gpt"].append(tuple(inputs[0].shape[:2])))
    image = ours.encode_image(images(2))
    for _ in range(2):
        state = ours.start(image, torch.tensor([BOS_ID]), beams=3)
        for _ in range(3):
            ours.step(state, torch.full((6,), 9))
    steps = [(6, 1)] * 2  # the first of the three is answered by the last visual token
    assert rows == {"vision_tower": [2], "clip_project": [2], "gpt": [(2, 5), *steps, *steps]}

    rows["gpt"].clear()
    input_ids, labels = captions(6)
    ours.loss(image, input_ids, labels)
    ours.loss(image, input_ids, labels)
    texts = (6, input_ids.shape[1] - 2)
    assert rows["gpt"] == [(2, 5), texts, texts]  # with a graph, once more


def test_a_loss_after_decoding_from_the_same_image_state_has_all_its_gradients() -> None:
    ours = tiny_clip_gpt2()
    input_ids, labels = captions(2)
    expected = gradients(ours, ours(images(2), input_ids, labels)[0])
    image = ours.encode_image(images(2))
    ours.step(ours.start(image, torch.tensor([BOS_ID, 7])), torch.tensor([8, 8]))
    assert largest_relative_difference(gradients(ours, ours.loss(image, input_ids, labels)[0]), expected) < 1e-6


def test_the_loss_sees_the_padding_of_no_row_but_the_end_token_where_it_is_a_label() -> None:
    ours = tiny_clip_gpt2()
    input_ids, labels = captions(4)
    loss, num_targets = ours(images(4), input_ids, labels)
    other_padding = torch.where((labels == -100) & (torch.arange(labels.shape[1]) > 2), 9, input_ids)
    assert not torch.equal(other_padding, input_ids)
    assert torch.equal(ours(images(4), other_padding, labels)[0], loss)

    no_end = torch.where(labels == EOS_ID, -100, labels)
    shorter, fewer_targets = ours(images(4), input_ids, no_end)
    assert num_targets - fewer_targets == 4
    assert shorter < loss


def test_label_smoothing_is_that_of_torch() -> None:
    ours = tiny_clip_gpt2(text_config={"label_smoothing": 0.1})
    pixel_values, (input_ids, labels) = images(4), captions(4)
    loss_sum, _ = ours(pixel_values, input_ids, labels)
    logits = ClipCap(ours, tiny_config()).logits(pixel_values, input_ids)[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], label_smoothing=0.1, reduction="sum")
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_batch_whose_images_differ_in_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="got 3 rows for 2 images"):
        tiny_clip_gpt2()(images(2), *captions(3))


def test_captions_without_a_word_are_learned_from_the_last_visual_token_alone() -> None:
    ours = tiny_clip_gpt2()
    input_ids = torch.tensor([[BOS_ID, EOS_ID]] * 2)
    loss, num_targets = ours(images(2), input_ids, torch.tensor([[-100, EOS_ID]] * 2))
    logits = ClipCap(ours, tiny_config()).logits(images(2), input_ids)[:, 0]
    assert num_targets == 2
    assert loss.item() == pytest.approx(F.cross_entropy(logits, input_ids[:, 1], reduction="sum").item(), rel=1e-6)
    assert len(gradients(ours, loss)) == len([p for p in ours.parameters() if p.requires_grad])


def test_a_batch_without_targets_gives_loss_zero_and_zero_gradients_everywhere() -> None:
    ours = tiny_clip_gpt2(freeze_vision=False).train()
    input_ids, labels = captions(4)
    loss, num_targets = ours(images(2), input_ids, torch.full_like(labels, -100))
    assert (loss.item(), int(num_targets)) == (0.0, 0)
    zeros = gradients(ours, loss)
    assert len(zeros) == len(list(ours.parameters()))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in zeros.values())


@pytest.mark.parametrize(
    ("freeze_vision", "freeze_text", "frozen"),
    [
        (True, "none", ("vision_tower.",)),
        (False, "none", ()),
        (True, "all", ("vision_tower.", "gpt.")),
        (True, 2, ("vision_tower.", "gpt.transformer.h.0.", "gpt.transformer.h.1.")),
        (False, 0, ()),
    ],
)
def test_freezing_leaves_exactly_the_named_parts_without_gradients_and_without_dropout(
    freeze_vision: bool, freeze_text: str | int, frozen: tuple[str, ...]
) -> None:
    ours = tiny_clip_gpt2(freeze_vision=freeze_vision, freeze_text=freeze_text)
    for mode in (False, True):
        ours.train(mode)
        found = gradients(ours, ours(images(2), *captions(4))[0])
        names = {name for name, _ in ours.named_parameters()}
        assert names - found.keys() == {name for name in names if name.startswith(frozen)}
    for name, module in ours.named_modules():
        assert module.training == (not f"{name}.".startswith(frozen)), name


def test_bfloat16_weights_give_a_float32_loss_and_float32_logits() -> None:
    ours = tiny_clip_gpt2("transformer").bfloat16()
    assert ours(images(2), *captions(2))[0].dtype == torch.float32
    state = ours.start(ours.encode_image(images(2)), torch.tensor([BOS_ID]))
    for _ in range(2):
        assert ours.step(state, torch.tensor([BOS_ID, BOS_ID])).dtype == torch.float32


def test_what_does_not_fit_is_refused() -> None:
    ours = tiny_clip_gpt2()
    with pytest.raises(ValueError, match=r"takes pixel_values \(images, 3, 32, 32\), got \(1, 3, 24, 24\)"):
        ours.encode_image(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="reads 64 positions, got 65"):
        ours.start(ours.encode_image(images(1)), torch.full((62,), 9))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mapper": "linear"}, "mapper is 'linear'; give one of linear_tanh, mlp, transformer"),
        ({"prefix_length": 0}, "prefix_length is 0; give a number from 1"),
        ({"prefix_length": 64}, "prefix_length is 64, which leaves no room"),
        ({"clip_length": "10"}, "clip_length is '10'; give a number from 1"),
        ({"num_mapper_layers": True}, "num_mapper_layers is True; give a number from 1"),
        ({"mapper": "transformer", "num_mapper_heads": 5}, "num_mapper_heads is 5, which does not divide"),
        ({"normalize_prefix": "yes"}, "normalize_prefix is 'yes'; give true or false"),
        ({"freeze_vision": 1}, "freeze_vision is 1; give true or false"),
        ({"freeze_text": "some"}, "freeze_text is 'some'; give none, all, or how many of the first blocks, up to 3"),
        ({"freeze_text": 4}, "freeze_text is 4; give none, all"),
        ({"freeze_text": True}, "freeze_text is True; give none, all"),
        ({"vision_config": {"model_type": "resnet"}}, "vision_config.model_type is 'resnet'; give one of clip_vision"),
        ({"vision_config": {"image_size": [32, 32]}}, r"vision_config.image_size is \[32, 32\]; give one number"),
        ({"text_config": {"model_type": "opt"}}, "text_config.model_type is 'opt'; give gpt2"),
        ({"text_config": {"add_cross_attention": True}}, "text_config.add_cross_attention is true; give false"),
        (
            {"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}},
            "vision_config.vision_use_head is false",
        ),
    ],
)
def test_a_configuration_that_means_nothing_is_refused_by_the_name_of_its_field(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        ClipGpt2(tiny_config(**changes))


def test_fresh_mappers_are_as_torch_draws_them_and_gpt2_as_transformers_does() -> None:
    config = tiny_config("transformer", text_config={"n_embd": 64}, prefix_length=20)
    torch.manual_seed(0)
    fresh = ClipGpt2(config).requires_grad_(False)
    constant = fresh.clip_project.get_parameter("prefix_const")
    assert float(constant.std()) == pytest.approx(1, abs=0.1)
    weight = fresh.clip_project.get_parameter("linear.weight")  # torch's: uniform within 1 / sqrt(24)
    assert float(weight.abs().max()) == pytest.approx(24**-0.5, rel=0.01)
    assert float(weight.std()) == pytest.approx(24**-0.5 / 3**0.5, rel=0.05)
    assert float(fresh.gpt.transformer.wte.weight.std()) == pytest.approx(0.02, rel=0.05)
    projection = fresh.gpt.get_parameter("transformer.h.0.mlp.c_proj.weight")
    assert float(projection.std()) == pytest.approx(0.02 / 6**0.5, rel=0.05)  # 3 layers of 2 paths


def test_the_output_layer_is_tied_to_the_token_embeddings() -> None:
    ours = tiny_clip_gpt2()
    for second_name, name in TIED_NAMES.items():
        assert ours.get_parameter(second_name) is ours.get_parameter(name)


@pytest.mark.parametrize("tower", ["clip_vision_model", "vit", "dinov2"])  # SigLIP's pooling is torch's own attention
def test_parameters_are_used_only_inside_the_module_that_owns_them(tower: str) -> None:
    ours = tiny_clip_gpt2("transformer", tower)
    pixel_values, (input_ids, labels) = images(2), captions(4)

    @torch.no_grad()
    def run() -> list[Tensor]:
        state = ours.start(ours.encode_image(pixel_values), torch.tensor([BOS_ID, 7, 8]))
        return [ours(pixel_values, input_ids, labels)[0], ours.step(state, torch.tensor([8, 8]))]

    expected = run()
    empty_parameters_outside_their_module(ours)
    for result, value in zip(run(), expected, strict=True):
        assert torch.equal(result, value)


def weights_by_formula(model: nn.Module) -> None:
    """The i-th value of the n-th parameter by name is sin(0.7 i + n), scaled, and around 1 in LayerNorms."""
    with torch.no_grad():
        for n, (name, parameter) in enumerate(sorted(model.named_parameters())):
            values = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + n)
            is_scale = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_((1 + 0.1 * values if is_scale else 0.5 * values).view_as(parameter))


GOLDEN = {
    "mlp": (
        [6.677020857295664, -7.301905812023246, 6.723116143031458, -5.036061796020956, -7.002276239916555],
        83.03790028732564,
    ),
    "transformer": (
        [5.455026711656108, -7.246559307995533, 7.843540814131989, -7.14756247100113, -6.1359686675447485],
        89.83191263152953,
    ),
    "linear_tanh": (
        [2.945392273402834, -6.075930559268921, 8.204888762079037, -8.98132111100959, -4.014222536564786],
        72.79787335168838,
    ),
}


@pytest.mark.parametrize("mapper", NAMES)
def test_logits_and_loss_of_weights_made_by_a_formula_are_what_they_always_were(mapper: str) -> None:
    ours = ClipGpt2(tiny_config(mapper)).eval().double()
    weights_by_formula(ours)
    pixel_values = torch.sin(torch.arange(3 * 32 * 32, dtype=torch.float64) * 0.3).view(1, 3, 32, 32)
    input_ids = torch.tensor([[BOS_ID, 7, 8, 21, 40, EOS_ID]])
    state = ours.start(ours.encode_image(pixel_values), torch.tensor([BOS_ID, 7]))
    logits = ours.step(state, torch.tensor([7]))[0, [0, 1, 2, EOS_ID, 8]]
    loss, _ = ours(pixel_values, input_ids, input_ids)
    expected_logits, expected_loss = GOLDEN[mapper]
    assert logits.tolist() == pytest.approx(expected_logits, rel=1e-7)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-7)
