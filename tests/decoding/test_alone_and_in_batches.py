"""An image alone and in any batch, at any place of it, has the same captions and scores."""

import pytest
import torch
from drawn import MAX_TIES, assert_tie, cases, draw_images, draw_prompt, draw_search
from torch import Tensor
from trained import KINDS, Banned, Change, Changed, family

from raycap.decoding.greedy import Decoded
from raycap.schema import DecodeSettings


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_has_the_captions_it_has_alone(kind: str) -> None:
    counts = dict.fromkeys(["captions", "ties", "left", "twice"], 0)

    def check(images: list[int], prompt: list[int], settings: DecodeSettings, banned: Banned) -> None:
        def found(
            batch: list[int], dtype: torch.dtype = torch.float32, change: Change = lambda logits_NV: logits_NV
        ) -> list[list[Decoded]]:
            ours = family(kind, dtype)
            # As the captioner has it: the seed follows from the image, so the same image is drawn the same caption.
            seeds = [4096 * image for image in batch]
            return ours.search(batch, prompt, settings, banned, model=Changed(ours.model, change), seeds=seeds)

        widths: list[int] = []

        def record(logits_NV: Tensor) -> Tensor:
            widths.append(len(logits_NV))
            return logits_NV

        together = found(images, change=record)
        alone = {image: found([image])[0] for image in set(images)}
        counts["captions"] += len(images)
        counts["left"] += widths[-1] < widths[0]
        counts["twice"] += len(set(images)) < len(images)
        for place, image in enumerate(images):
            if ids(together[place]) == ids(alone[image]):
                scores = [caption.log_prob for caption in alone[image]]
                assert [caption.log_prob for caption in together[place]] == pytest.approx(scores, abs=1e-4)
                continue
            counts["ties"] += 1
            assert_tie(
                lambda change, image=image: ids(found([image], torch.float64, change)[0]),
                ids(found(images, torch.float64)[place]),
            )

    for random in cases(80, kind):
        check(draw_images(random, 12, num_images=16), draw_prompt(random), *draw_search(random))
    print(kind, counts)
    assert counts["ties"] <= MAX_TIES * counts["captions"]
    assert counts["left"] > 5
    assert counts["twice"] > 20


def ids(captions: list[Decoded]) -> list[tuple[int, ...]]:
    return [caption.ids for caption in captions]
