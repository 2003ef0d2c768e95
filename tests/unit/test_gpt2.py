"""Our GPT-2 against transformers' GPT2LMHeadModel: names, logits, gradients, caches, shared prefixes."""

import pytest
import torch
import torch.nn.functional as F
from model_checks import empty_parameters_outside_their_module, gradients, largest_relative_difference
from safetensors.torch import load_file
from tiny_gpt2 import (
    BOS_ID,
    VOCAB_SIZE,
    assert_drawn_alike,
    captions,
    lengths_mask,
    set_by_formula,
    tiny_gpt2_config,
    tiny_gpt2_pair,
)
from torch import Tensor
from transformers import GPT2LMHeadModel

from raycap.models.cache import ImageState, Prefix, TextCache, TextState
from raycap.models.gpt2 import MASK_BUFFER, TIED_NAMES, Gpt2

torch.set_num_threads(1)

PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model: Gpt2, ids: Tensor, **sources: ImageState | Prefix | TextCache) -> Tensor:
    logits: Tensor = model.lm_head(model(model.embed(ids), **sources))
    return logits


def next_token_loss(logits_NLV: Tensor, labels_NL: Tensor) -> Tensor:
    """The mean. Logits may begin with positions of a prefix."""
    logits_NLV = logits_NLV[:, -labels_NL.shape[1] : -1]
    return F.cross_entropy(logits_NLV.transpose(1, 2), labels_NL[:, 1:])


def read_prefix(model: Gpt2, embeddings_BPD: Tensor) -> Prefix:
    prefix = Prefix()
    model(embeddings_BPD, text=prefix)
    return prefix


@pytest.mark.parametrize(
    "fields",
    [{}, {"n_inner": 48}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}],
    ids=lambda fields: next(iter(fields), "default"),
)
@PRECISIONS
def test_logits_loss_and_every_gradient_equal_transformers(
    fields: dict[str, object], dtype: torch.dtype, tolerance: float
) -> None:
    ours, published = (model.to(dtype) for model in tiny_gpt2_pair(**fields))
    input_ids, labels = captions(4)
    mask = lengths_mask(labels)

    logits_NLV = logits_of(ours, input_ids)
    expected = published(input_ids, attention_mask=mask, labels=labels)
    assert logits_NLV.dtype == dtype
    difference = (logits_NLV - expected.logits)[mask.bool()].abs().max()
    assert difference < tolerance * expected.logits.abs().max()

    loss = next_token_loss(logits_NLV, labels)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)  # theirs is always computed in float32
    expected_loss = next_token_loss(expected.logits, labels)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    our_gradients = gradients(ours, loss)
    assert len(our_gradients) == len(list(ours.parameters()))
    assert largest_relative_difference(our_gradients, gradients(published, expected_loss)) < tolerance


@PRECISIONS
def test_with_cross_attention_rows_that_share_an_image_equal_transformers(dtype: torch.dtype, tolerance: float) -> None:
    ours, published = (model.to(dtype) for model in tiny_gpt2_pair(add_cross_attention=True))
    input_ids, labels = captions(4)
    states_BTD, their_states_BTD = (noise(2, 5, 32).to(dtype).requires_grad_() for _ in range(2))

    logits_NLV = logits_of(ours, input_ids, image=ImageState(states_BTD))
    loss = next_token_loss(logits_NLV, labels)
    repeated = their_states_BTD.repeat_interleave(2, dim=0)
    expected = published(
        input_ids, attention_mask=lengths_mask(labels), encoder_hidden_states=repeated, labels=labels, use_cache=False
    )

    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)  # theirs is always computed in float32
    expected_loss = next_token_loss(expected.logits, labels)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    our_gradients = gradients(ours, loss)
    assert len(our_gradients) == len(list(ours.parameters()))
    assert largest_relative_difference(our_gradients, gradients(published, expected_loss)) < tolerance
    assert states_BTD.grad is not None
    scale = their_states_BTD.grad.abs().max()
    assert (states_BTD.grad - their_states_BTD.grad).abs().max() < tolerance * scale


@pytest.mark.parametrize("k", [1, 2])
@PRECISIONS
def test_a_prefix_read_once_per_image_equals_transformers_reading_it_in_every_row(
    dtype: torch.dtype, tolerance: float, k: int
) -> None:
    ours, published = (model.to(dtype) for model in tiny_gpt2_pair())
    input_ids, labels = captions(4)
    prefix_BPD, their_prefix_BPD = (noise(4 // k, 3, 32).to(dtype).requires_grad_() for _ in range(2))

    logits_NLV = logits_of(ours, input_ids, prefix=read_prefix(ours, prefix_BPD))
    loss = next_token_loss(logits_NLV, labels)
    embeddings = torch.cat([their_prefix_BPD.repeat_interleave(k, dim=0), published.transformer.wte(input_ids)], dim=1)
    ones, ignored = torch.ones(4, 3, dtype=torch.long), torch.full((4, 3), -100)
    expected = published(
        inputs_embeds=embeddings,
        attention_mask=torch.cat([ones, lengths_mask(labels)], dim=1),
        labels=torch.cat([ignored, labels], dim=1),
    )

    seen = lengths_mask(labels).bool()
    difference = (logits_NLV - expected.logits[:, 3:])[seen].abs().max()
    assert difference < tolerance * expected.logits.abs().max()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)  # theirs is always computed in float32
    expected_loss = next_token_loss(expected.logits, labels)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    our_gradients = gradients(ours, loss)
    assert len(our_gradients) == len(list(ours.parameters()))
    assert largest_relative_difference(our_gradients, gradients(published, expected_loss)) < tolerance
    assert prefix_BPD.grad is not None
    scale = their_prefix_BPD.grad.abs().max()
    assert (prefix_BPD.grad - their_prefix_BPD.grad).abs().max() < tolerance * scale


def test_reading_a_prefix_gives_its_own_hidden_states_too() -> None:
    ours, published = tiny_gpt2_pair()
    prefix_BPD, prefix = noise(2, 3, 32), Prefix()
    with torch.no_grad():
        logits_BPV = ours.lm_head(ours(prefix_BPD, text=prefix))
        torch.testing.assert_close(logits_BPV, published(inputs_embeds=prefix_BPD).logits, rtol=1e-5, atol=1e-5)
    assert (prefix.length, prefix.num_images) == (3, 2)


@pytest.mark.parametrize("source", ["text alone", "a prefix beside the text", "a prefix as the first of the text"])
@torch.no_grad()
def test_one_token_at_a_time_with_a_cache_equals_the_whole_text_at_once(source: str) -> None:
    ours, published = tiny_gpt2_pair()
    prefix_BPD = noise(2, 3, 32)
    ids = torch.randint(0, BOS_ID, (4, 40), generator=torch.Generator().manual_seed(3))  # the cache grows on the way
    embeddings = published.transformer.wte(ids)
    text, prefix = TextCache(ours.num_layers, num_rows=4), None
    first = 0
    if source != "text alone":
        embeddings = torch.cat([prefix_BPD.repeat_interleave(2, dim=0), embeddings], dim=1)
        first = 3
    if source == "a prefix beside the text":
        prefix = read_prefix(ours, prefix_BPD)
    if source == "a prefix as the first of the text":
        ours(prefix_BPD, text=text)
        text.reorder(torch.tensor([0, 0, 1, 1]))
    expected_NLV = published(inputs_embeds=embeddings).logits[:, first:]

    steps = [ours.lm_head(ours(ours.embed(ids[:, :5]), text=text, prefix=prefix))]  # several at once, then one by one
    for i in range(5, 38):
        steps.append(ours.lm_head(ours(ours.embed(ids[:, i : i + 1]), text=text, prefix=prefix)))
    steps.append(ours.lm_head(ours(ours.embed(ids[:, 38:]), text=text, prefix=prefix)))
    assert text.num_rows == 4
    torch.testing.assert_close(torch.cat(steps, dim=1), expected_NLV, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_rows_that_are_reordered_and_images_that_are_kept_go_on_behind_their_prefix() -> None:
    ours, published = tiny_gpt2_pair()
    prefix_BPD = noise(3, 3, 32)
    state = TextState(read_prefix(ours, prefix_BPD), ours.num_layers)
    state.reorder(torch.arange(3).repeat_interleave(2))
    for ids in ([BOS_ID] * 6, [10, 11, 12, 13, 14, 15]):
        ours(ours.embed(torch.tensor(ids)[:, None]), text=state, prefix=state.image)
    state.reorder(torch.tensor([1, 1, 3, 2, 4, 5]))
    state.keep(torch.tensor([2, 1]))
    assert (state.num_rows, state.image.num_images) == (4, 2)
    last = torch.tensor([20, 21, 22, 23])[:, None]
    logits_NV = ours.lm_head(ours(ours.embed(last), text=state, prefix=state.image)[:, -1])

    texts = torch.tensor([[BOS_ID, 14, 20], [BOS_ID, 15, 21], [BOS_ID, 13, 22], [BOS_ID, 12, 23]])
    embeddings = torch.cat([prefix_BPD[[2, 2, 1, 1]], published.transformer.wte(texts)], dim=1)
    expected_NV = published(inputs_embeds=embeddings).logits[:, -1]
    torch.testing.assert_close(logits_NV, expected_NV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("add_cross_attention", [False, True])
def test_state_dicts_load_strictly_both_ways_and_the_tie_holds(tmp_path, add_cross_attention: bool) -> None:
    ours, published = tiny_gpt2_pair(add_cross_attention=add_cross_attention)
    assert {name: t.shape for name, t in ours.state_dict().items()} == {
        name: t.shape for name, t in published.state_dict().items()
    }
    published.load_state_dict(ours.state_dict(), strict=True)
    assert ours.lm_head.weight is ours.transformer.wte.weight

    published.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert set(ours.state_dict()) - set(weights) == set(TIED_NAMES)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in weights.items())


def test_masks_that_older_files_hold_are_told_from_weights() -> None:
    masks = ("attn.bias", "attn.masked_bias", "crossattention.bias", "crossattention.masked_bias")
    for above in ("", "transformer.", "decoder.transformer."):  # GPT-2's own files name its body alone
        assert all(MASK_BUFFER.search(f"{above}h.11.{mask}") for mask in masks)
    ours, _ = tiny_gpt2_pair(add_cross_attention=True)
    assert not any(MASK_BUFFER.search(name) for name in ours.state_dict())


@pytest.mark.parametrize("add_cross_attention", [False, True])
def test_fresh_weights_are_drawn_as_transformers_draws_them(add_cross_attention: bool) -> None:
    torch.manual_seed(0)
    config = tiny_gpt2_config(n_layer=3, add_cross_attention=add_cross_attention)
    assert_drawn_alike(Gpt2(config).state_dict(), GPT2LMHeadModel(config).state_dict())


def test_configurations_that_would_be_computed_differently_are_refused() -> None:
    for field, value in (
        ("activation_function", "relu"),
        ("reorder_and_upcast_attn", True),
    ):
        with pytest.raises(ValueError, match=f"{field}={value!r}"):
            Gpt2(tiny_gpt2_config(**{field: value}))
    with pytest.raises(ValueError, match="n_embd must be a multiple of n_head, got 32 and 5"):
        Gpt2(tiny_gpt2_config(n_head=5))


def test_inputs_that_do_not_fit_are_refused() -> None:
    ours, _ = tiny_gpt2_pair()
    prefix = read_prefix(ours, noise(2, 10, 32))
    with pytest.raises(ValueError, match="got 3 rows for 2 images"):
        ours(noise(3, 4, 32), prefix=prefix)
    with pytest.raises(ValueError, match="reads 64 positions, got 65"):
        ours(noise(2, 55, 32), prefix=prefix)


def test_dropout_is_where_the_configuration_puts_it() -> None:
    ids, image = torch.tensor([[5, 6, 7]]), ImageState(noise(1, 5, 32))

    def train_logits(ids: Tensor, **dropped: float) -> Tensor:
        none = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        ours, _ = tiny_gpt2_pair(add_cross_attention=True, **{**none, **dropped})
        return logits_of(ours.train(), ids, image=ImageState(image.states_BTE))

    no_token = train_logits(ids, embd_pdrop=1.0)
    assert torch.equal(no_token, train_logits(ids + 1, embd_pdrop=1.0))
    no_mixing = train_logits(ids, attn_pdrop=1.0)[:, -1]
    assert torch.equal(no_mixing, train_logits(torch.tensor([[8, 9, 7]]), attn_pdrop=1.0)[:, -1])
    assert not torch.equal(no_mixing, train_logits(ids + 1, attn_pdrop=1.0)[:, -1])

    ours, _ = tiny_gpt2_pair(add_cross_attention=True)
    body = ours.transformer
    no_layer_adds_anything = ours.lm_head(body.ln_f(body.wte(ids) + body.wpe(torch.arange(3))))
    assert torch.equal(train_logits(ids, resid_pdrop=1.0), no_layer_adds_anything)

    ours, _ = tiny_gpt2_pair(embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    assert torch.equal(logits_of(ours, ids), logits_of(ours, ids))
    assert not torch.equal(logits_of(ours.train(), ids), logits_of(ours, ids))


def test_bfloat16_weights_give_float32_logits_close_to_those_of_float32() -> None:
    ours, _ = tiny_gpt2_pair()
    ids = captions(2)[0]
    expected = logits_of(ours, ids)
    logits = logits_of(ours.bfloat16(), ids)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
def test_parameters_are_used_only_inside_the_module_that_owns_them() -> None:
    ours, _ = tiny_gpt2_pair(add_cross_attention=True)
    ids, states_BTD = captions(4)[0], noise(2, 5, 32)

    def run() -> Tensor:
        image, prefix = ImageState(states_BTD), Prefix()
        ours(noise(2, 3, 32), image=image, text=prefix)
        return logits_of(ours, ids, image=image, prefix=prefix)

    expected = run()
    empty_parameters_outside_their_module(ours)
    assert torch.equal(run(), expected)


# Computed with transformers' GPT2LMHeadModel in float64. The weights come from a formula, not from a random generator.
GOLDEN = [
    [0.715166987703, 4.579288679605, -6.223317445412, 2.906364930329],
    [-6.969559689384, 5.526142901861, 0.322495334212, -5.914053109544],
    [3.687358420687, 0.694860950447, -4.523164793693, 4.745781466275],
]


@torch.no_grad()
def test_logits_of_weights_given_by_a_formula_stay_what_they_were() -> None:
    config = tiny_gpt2_config()
    ours = set_by_formula(Gpt2(config).double()).eval()
    published = set_by_formula(GPT2LMHeadModel(config).double()).eval()
    ids = torch.tensor([[BOS_ID, 3, 14, 15, 9, 26]])
    for logits in (logits_of(ours, ids), published(ids).logits):
        assert logits.shape == (1, 6, VOCAB_SIZE)
        torch.testing.assert_close(
            logits[0, [0, 3, 5], :4], torch.tensor(GOLDEN, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )
