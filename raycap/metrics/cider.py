"""CIDEr in pure Python: the measure a training run watches. Owns its formula, the references' statistics and the check
that candidates and references belong together; the Java tokenizer and the other COCO metrics are coco.py's.

The formula is that of pycocoevalcap's `Cider`, whose numbers papers report: CIDEr-D's clipping and Gaussian length
penalty (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726, section 4). Its quirks, kept because scores must agree:

- The weight of an n-gram is tf * (log(number of images) - log(document frequency)), tf being a count, not a share.
- With one image every weight is zero, and so is every score.
- An n-gram that no reference has counts as if one image had it: it lengthens the candidate's vector.
- The penalty compares lengths in bigrams, so captions of no word and of one word are equally long.
- Document frequency comes from the references given, so scores over different sets of images do not compare.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from raycap.metrics.ptb_like import ptb_like

ORDERS = (1, 2, 3, 4)  # n-gram lengths, cider.py of pycocoevalcap
SIGMA = 6.0  # of the length penalty, in bigrams, same file
SCALE = 10.0  # same file

Ngram = tuple[str, ...]
Weights = tuple[dict[Ngram, float], ...]  # one dict an order
Vector = tuple[Weights, tuple[float, ...], int]  # weights, their Euclidean norm an order, length in bigrams


@dataclass(frozen=True, kw_only=True, slots=True)
class CiderReferences:
    """References made ready by prepare_references. rarity: log(images) - log(document frequency) of an n-gram."""

    vectors: dict[str, list[Vector]]
    rarity: dict[Ngram, float]
    log_num_images: float
    tokenize: Callable[[str], list[str]]


def cider(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenize: Callable[[str], list[str]] = ptb_like,
) -> tuple[float, dict[str, float]]:
    """The mean over all keys and the score of each key, range 0 to 10; equal to pycocoevalcap's up to rounding.

    tokenize: `str.split` where captions have been tokenised already. Raises ValueError as check_pairs does.
    """
    check_pairs(candidates, references)
    return score(candidates, prepare_references(references, tokenize))


def prepare_references(
    references: Mapping[str, Sequence[str]], tokenize: Callable[[str], list[str]] = ptb_like
) -> CiderReferences:
    """What `score` needs of the references, computed once for many scorings; 5,000 x 5 captions take about 3 s."""
    check_references(references)
    counts = {key: [_count_ngrams(tokenize(caption)) for caption in captions] for key, captions in references.items()}
    document_frequency: Counter[Ngram] = Counter()
    for captions in counts.values():
        document_frequency.update({ngram for caption in captions for order in caption for ngram in order})
    log_num_images = math.log(len(references))
    rarity = {ngram: log_num_images - math.log(count) for ngram, count in document_frequency.items()}
    vectors = {key: [_weigh(c, rarity, log_num_images) for c in captions] for key, captions in counts.items()}
    return CiderReferences(vectors=vectors, rarity=rarity, log_num_images=log_num_images, tokenize=tokenize)


def score(candidates: Mapping[str, str], prepared: CiderReferences) -> tuple[float, dict[str, float]]:
    """The mean over the candidates and the score of each key, range 0 to 10.

    Candidates may cover a part of the prepared keys; document frequency stays that of all of them. Raises ValueError
    for no candidates and for keys without references.
    """
    if not candidates:
        raise ValueError("CIDEr needs candidates, got none")
    if missing := [key for key in candidates if key not in prepared.vectors]:
        raise ValueError(f"{len(missing)} candidates have no references: {_first_three(missing)}")
    scores = {}
    for key, caption in candidates.items():
        vector = _weigh(_count_ngrams(prepared.tokenize(caption)), prepared.rarity, prepared.log_num_images)
        scores[key] = SCALE * fmean(_similarity(vector, reference) for reference in prepared.vectors[key])
    return fmean(scores.values()), scores


def check_pairs(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError, naming the first three keys, unless both have the same keys, one or more, with references."""
    if not candidates:
        raise ValueError(f"caption metrics need candidates, got none for {len(references)} keys of references")
    if missing := [key for key in candidates if key not in references]:
        raise ValueError(f"{len(missing)} candidates have no references: {_first_three(missing)}")
    if missing := [key for key in references if key not in candidates]:
        raise ValueError(f"{len(missing)} keys with references have no candidate: {_first_three(missing)}")
    check_references(references)


def check_references(references: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError unless every key has a list of one or more references."""
    if not references:
        raise ValueError("caption metrics need references, got none")
    # A plain string would be taken apart into letters without a complaint.
    if wrong := [key for key, captions in references.items() if isinstance(captions, str) or not captions]:
        raise ValueError(f"{len(wrong)} keys need a list of at least one reference: {_first_three(wrong)}")


def _first_three(keys: Iterable[str]) -> str:
    return ", ".join(repr(key) for key in islice(keys, 3))


def _count_ngrams(words: list[str]) -> tuple[Counter[Ngram], ...]:
    return tuple(Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in ORDERS)


def _weigh(counts: tuple[Counter[Ngram], ...], rarity: dict[Ngram, float], rarest: float) -> Vector:
    weights = tuple({ngram: count * rarity.get(ngram, rarest) for ngram, count in order.items()} for order in counts)
    norms = tuple(math.sqrt(sum([weight * weight for weight in order.values()])) for order in weights)
    return weights, norms, counts[1].total()


def _similarity(candidate: Vector, reference: Vector) -> float:
    """The clipped cosine, averaged over the orders, times the length penalty; range 0 to 1."""
    weights, norms, length = candidate
    ref_weights, ref_norms, ref_length = reference
    total = 0.0
    for mine, norm, theirs, ref_norm in zip(weights, norms, ref_weights, ref_norms, strict=True):
        if norm and ref_norm:
            # In the candidate's order: an order that hashing decides would change the last digit from run to run.
            shared = [(weight, theirs[ngram]) for ngram, weight in mine.items() if ngram in theirs]
            total += sum([min(weight, other) * other for weight, other in shared]) / (norm * ref_norm)
    return total / len(ORDERS) * math.exp(-((length - ref_length) ** 2) / (2 * SIGMA**2))
