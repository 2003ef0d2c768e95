"""Several captions of an image in one vision pass train as one row per caption does: the same loss, the same gradients."""

import pytest
import torch
from tiny import EOS_ID, PAD_ID, tiny_blip_pair
from torch import Tensor

from raycap.models.blip import Blip

torch.set_num_threads(1)

IMAGES, CAPTIONS, LENGTH = 3, 5, 14


def packed(lengths: list[int], *, absent: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel values (IMAGES, 3, 32, 32), ids and labels (IMAGES * CAPTIONS, LENGTH).

    lengths: of the rows, in tokens. absent: rows that only fill up an image with fewer captions; they have no label.
    """
    generator = torch.Generator().manual_seed(5)
    pixel_values = torch.randn(IMAGES, 3, 32, 32, generator=generator)
    input_ids = torch.full((IMAGES * CAPTIONS, LENGTH), PAD_ID)
    labels = torch.full_like(input_ids, -100)
    for row, length in enumerate(lengths):
        words = torch.randint(4, 58, (length - 2,), generator=generator)
        input_ids[row, :length] = torch.tensor([58, *words, EOS_ID])
        if row not in absent:
            labels[row, 2:length] = input_ids[row, 2:length]  # the first word is a prompt
    return pixel_values, input_ids, labels


def trained(
    model: Blip, pixel_values: Tensor, input_ids: Tensor, labels: Tensor
) -> tuple[float, int, dict[str, Tensor]]:
    """(mean loss, number of targets, gradients by name) of one step."""
    model.zero_grad()
    loss_sum, num_targets = model(pixel_values, input_ids, labels)
    loss = loss_sum / num_targets
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return loss.item(), int(num_targets), gradients


RAGGED = [3 + (7 * row) % 12 for row in range(IMAGES * CAPTIONS)]
CASES = {
    "all of one length": ([LENGTH] * (IMAGES * CAPTIONS), ()),
    "ragged": (RAGGED, ()),
    "an image with two captions, one with none": (RAGGED, (2, 3, 4, 10, 11, 12, 13, 14)),
}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("lengths", "absent"), CASES.values(), ids=CASES.keys())
def test_captions_packed_by_image_train_as_one_row_each_does(
    lengths: list[int], absent: tuple[int, ...], label_smoothing: float
) -> None:
    ours, _ = tiny_blip_pair(label_smoothing=label_smoothing)
    pixel_values, input_ids, labels = packed(lengths, absent=absent)
    loss, num_targets, gradients = trained(ours, pixel_values, input_ids, labels)

    rows = [row for row in range(IMAGES * CAPTIONS) if row not in absent]  # a row per caption has none without one
    images = torch.tensor(rows) // CAPTIONS
    expected, expected_targets, expected_gradients = trained(ours, pixel_values[images], input_ids[rows], labels[rows])

    assert num_targets == expected_targets == sum(lengths[row] - 2 for row in rows)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        theirs = expected_gradients[name]
        if name.endswith("key.bias"):  # adds the same to every score of a softmax: 0 but for rounding
            assert max(gradient.abs().max(), theirs.abs().max()) < 1e-5
            continue
        assert (gradient - theirs).norm() < 1e-5 * theirs.norm(), name
