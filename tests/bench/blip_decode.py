"""Images captioned per second of CPU, BLIP base at 384 pixels: ours against transformers' generate().

8 images, 20 new tokens each (the end token is forbidden), fp32 on one thread, sides in turn. Both search the same images
with the same weights; every caption, of beam search all num_beams of an image in their order, is asserted to have the same
tokens first. From pixels to tokens; of blip_beam5_decode without the vision tower, but with the keys and values that the
text decoder makes of its states.

Weights are random. As drawn, the text looks at nothing and says one word for ever, so some are scaled: the chances of a
word are then about those of a trained model, and nearly all words differ.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration

from raycap.decoding import search
from raycap.models.blip import Blip
from raycap.models.cache import ImageState
from raycap.models.inference import use_fast_products
from raycap.models.presets import BLIP_BASE_384
from raycap.schema import DecodeSettings
from tests.bench.sides import Captions, compared, cpu_seconds, same

NUM_IMAGES, NEW_TOKENS, ROUNDS = 8, 20, 3
BOS_ID, EOS_ID = 30_522, 102
SCALES = {"word_embeddings": 12.0, "query": 6.0, "key": 6.0, "dense": 0.5}  # of the text decoder's weights


def build_published(seed: int = 0) -> BlipForConditionalGeneration:
    torch.manual_seed(seed)
    published = BlipForConditionalGeneration(BlipConfig.from_dict(BLIP_BASE_384)).eval()
    with torch.no_grad():
        for name, parameter in published.text_decoder.named_parameters():
            for part, scale in SCALES.items():
                if part in name and parameter.ndim > 1:
                    parameter.mul_(scale)
    return published


def build_ours(weights: dict[str, Tensor]) -> Blip:
    """As Captioner.load leaves it, but for the normalisation of pixels."""
    ours = Blip(BlipConfig.from_dict(BLIP_BASE_384)).eval()
    ours.load_state_dict(weights)
    use_fast_products(ours)
    return ours


def draw_pixels(num_images: int = NUM_IMAGES, seed: int = 1) -> Tensor:
    return torch.randn(num_images, 3, 384, 384, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def our_captions(model: Blip, states: Tensor, num_beams: int) -> Captions:
    """num_beams of each image, best first. states: what the vision tower says of the images."""
    settings = DecodeSettings(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, num_beams=num_beams)
    found = search(model, ImageState(states), torch.tensor([BOS_ID]), eos_id=EOS_ID, settings=settings)
    return [list(caption.ids) for captions in found for caption in captions]


@torch.no_grad()
def generated_captions(model: BlipForConditionalGeneration, states: Tensor, num_beams: int, **options: Any) -> Captions:
    """The same by generate(), called as BlipForConditionalGeneration.generate() does. options: more of its own, or others."""
    ids: Tensor = model.text_decoder.generate(
        input_ids=torch.full((len(states), 1), BOS_ID),
        encoder_hidden_states=states,
        encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
        eos_token_id=EOS_ID,
        pad_token_id=0,
        **(_options(num_beams) | options),
    )
    return [row[1:] for row in ids.tolist()]


@torch.no_grad()
def our_captions_of(model: Blip, pixels: Tensor, num_beams: int) -> Captions:
    return our_captions(model, model.encode_image(pixels).states_BTE, num_beams)


def generated_captions_of(model: BlipForConditionalGeneration, pixels: Tensor, num_beams: int) -> Captions:
    ids: Tensor = model.generate(pixels, **_options(num_beams))
    return [row[1:] for row in ids.tolist()]


def _options(num_beams: int) -> dict[str, Any]:
    return {
        "num_beams": num_beams,
        "num_return_sequences": num_beams,
        "do_sample": False,
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
    }


def measure_greedy() -> dict[str, Any]:
    return _measure("blip_greedy", 1, must=1.2, aim=1.4)


def measure_beam3() -> dict[str, Any]:
    return _measure("blip_beam3", 3, must=1.6, aim=2.2)


def measure_beam5() -> dict[str, Any]:
    return _measure("blip_beam5", 5, must=2.2, aim=3.2)


def measure_beam5_decode() -> dict[str, Any]:
    return _measure("blip_beam5_decode", 5, must=3.5, aim=6, decode_only=True)


def _measure(name: str, num_beams: int, *, must: float, aim: float, decode_only: bool = False) -> dict[str, Any]:
    torch.set_num_threads(1)
    published = build_published()
    ours = build_ours(published.state_dict())
    pixels = draw_pixels()
    with torch.no_grad():
        states = published.vision_model(pixels).last_hidden_state
    sides: dict[str, Callable[[], Captions]] = {
        "peer": lambda: generated_captions_of(published, pixels, num_beams),
        "ours": lambda: our_captions_of(ours, pixels, num_beams),
    }
    if decode_only:
        sides = {
            "peer": lambda: generated_captions(published, states, num_beams),
            "ours": lambda: our_captions(ours, states, num_beams),
        }
    said = same(sides["ours"](), sides["peer"]())
    spent = cpu_seconds(sides, ROUNDS)
    return compared(spent, NUM_IMAGES, said, name=name, unit="images/s", must=must, aim=aim)
