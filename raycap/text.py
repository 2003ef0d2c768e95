"""Captions as text and as token ids. Owns the cleaning, the roles of special tokens and the tokenizer's files.

The ids of the roles come from a TextSpec, because a tokenizer cannot always be asked for them: BLIP's published folders
hold BERT's plain vocabulary, whose [CLS] is not the decoder's first token; [DEC] and [ENC] are in the model's config
alone. Only the `tokenizers` library is imported: transformers takes seconds, and tokenizer.json is enough.

A row is "[DEC] prompt caption [SEP]". Shapes: N rows, L tokens.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from raycap import storage
from raycap.errors import CheckpointError, StorageError

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
END_OF_TEXT = "<|endoftext|>"  # GPT-2's only special token: first, end and padding in one
DEC, ENC = "[DEC]", "[ENC]"  # BLIP's first tokens of a caption to generate and of a caption to match with an image
IGNORED = -100  # a label that no loss counts (torch's and Hugging Face's convention)

MAX_WORDS = 30  # of a caption: salesforce/BLIP, data/coco_karpathy_dataset.py
_BLIP_REMOVED = re.compile(r"[.!\"()*#:;~]")  # salesforce/BLIP, data/utils.py, pre_caption


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSpec:
    """How a caption becomes token ids. Stored in the checkpoint.

    prompt: put before every caption, in training and in generation. max_tokens: longest row, everything included.
    clean: captions are cleaned as BLIP's are, see clean_caption; False keeps their case and punctuation. max_words: a
    caption's words beyond are cut, whether it is cleaned or not; None keeps all. Both defaults are BLIP's, and what a
    checkpoint means that is older than these fields. Raises ValueError for values that mean nothing.
    """

    prompt: str
    bos_id: int
    eos_id: int
    pad_id: int
    max_tokens: int
    clean: bool = True
    max_words: int | None = MAX_WORDS

    def __post_init__(self) -> None:
        if self.clean not in (True, False):
            raise ValueError(f"clean is {self.clean!r} in the text settings; give true or false")
        if self.max_words is not None and self.max_words < 1:
            raise ValueError(
                f"max_words is {self.max_words} in the text settings, a caption needs at least 1; give a larger one, or none "
                f"for captions of any length"
            )


def clean_caption(text: str, max_words: int | None = MAX_WORDS, *, clean: bool = True) -> str:
    """The caption as BLIP trains on it: lower case, the characters .!"()*#:;~ and repeated whitespace as one space, at
    most max_words words. A clean caption stays as it is. clean=False: its case and its characters stay.
    """
    if clean:
        text = _BLIP_REMOVED.sub(" ", text.lower())
    return " ".join(text.split()[:max_words])


def train_wordpiece(captions: Iterable[str], max_words: int = 30_000) -> Tokenizer:
    """A WordPiece tokenizer whose vocabulary is the max_words most frequent words of the cleaned captions, and every
    character of them, so that other words of the same alphabet are spelled.

    It splits text as bert-base-uncased does. Ids: [PAD] = 0, [UNK], [CLS], [SEP], [MASK], characters, words, and [DEC]
    and [ENC] last, where BLIP has them. The library's own trainer is not used: it gives other pieces and other ids in
    every process, as it goes through a hash map with a random seed.
    """
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word
        for caption in captions
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(clean_caption(caption, None)))
    )
    characters = sorted({character for word in counts for character in word})
    words = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
    pieces = [PAD, UNK, CLS, SEP, MASK, *characters, *(f"##{c}" for c in characters), *words, DEC, ENC]
    tokenizer = _wordpiece(list(dict.fromkeys(pieces)), lowercase=True)
    # tokenize() does without it; it is what others who load the folder expect of a BERT tokenizer.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (CLS, SEP)],
    )
    tokenizer.add_special_tokens([DEC, ENC])
    return tokenizer


def role_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """(bos_id, eos_id, pad_id) by name: [DEC], [SEP], [PAD], or GPT-2's <|endoftext|> for all three. Raises CheckpointError if
    a name is missing.
    """
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    if end_of_text is not None:
        return end_of_text, end_of_text, end_of_text
    bos_id, eos_id, pad_id = (tokenizer.token_to_id(token) for token in (DEC, SEP, PAD))
    if bos_id is None or eos_id is None or pad_id is None:
        missing = [token for token in (DEC, SEP, PAD) if tokenizer.token_to_id(token) is None]
        raise CheckpointError(
            f"the tokenizer has no {' and no '.join(missing)} among its {tokenizer.get_vocab_size()} tokens; a model "
            f"trained from scratch needs [DEC], [SEP] and [PAD], or GPT-2's {END_OF_TEXT}, so pass a tokenizer made by "
            f"train_wordpiece or GPT-2's"
        )
    return bos_id, eos_id, pad_id


def text_spec(tokenizer: Tokenizer, *, prompt: str = "", max_tokens: int = 40) -> TextSpec:
    """The spec of a tokenizer whose roles have names, see role_ids. max_tokens: BLIP's (models/blip.py, forward)."""
    bos_id, eos_id, pad_id = role_ids(tokenizer)
    return TextSpec(prompt=prompt, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, max_tokens=max_tokens)


def prompt_ids(tokenizer: Tokenizer, spec: TextSpec) -> list[int]:
    """[DEC] and the prompt: what generation starts from."""
    return [spec.bos_id, *_encode(tokenizer, spec.prompt)]


def banned_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token ids of each word, at the start of a text and behind a space. Raises ValueError for one it cannot spell."""
    found: dict[tuple[int, ...], None] = {}
    unknown = tokenizer.token_to_id(UNK)
    for word in words:
        for spelled in (word.strip(), f" {word.strip()}"):
            ids = tuple(_encode(tokenizer, spelled))
            if not ids or unknown in ids:
                raise ValueError(f"the tokenizer cannot spell the banned word {word!r}; leave it out")
            found[ids] = None
    return tuple(found)


def required_ids(
    tokenizer: Tokenizer, words: Sequence[str], banned: tuple[tuple[int, ...], ...] = ()
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Of each word its token ids at the start of a text, if they are others and none is banned, and those behind a space.

    Raises ValueError for a word that the tokenizer cannot spell or writes in another way, and for one that holds a banned one.
    """
    found: dict[tuple[tuple[int, ...], ...], None] = {}
    unknown = tokenizer.token_to_id(UNK)
    for word in dict.fromkeys(word.strip() for word in words):
        spellings = list(dict.fromkeys(tuple(_encode(tokenizer, spelled)) for spelled in (word, f" {word}")))
        for ids in spellings:
            written = decode(tokenizer, ids)
            if not written or unknown in ids or goes_on(tokenizer, spellings[-1][0]):
                raise ValueError(f"the tokenizer cannot spell the required word {word!r}; leave it out")
            if written != word:
                raise ValueError(f"the tokenizer writes the required word {word!r} as {written!r}; give it so")
        allowed = [ids for ids in spellings if not any(_holds(ids, others) for others in banned)]
        if spellings[-1] not in allowed:
            raise ValueError(f"the required word {word!r} holds a banned one; give one of them")
        found[tuple(allowed)] = None
    return tuple(found)


def _holds(ids: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return any(ids[first : first + len(part)] == part for first in range(len(ids)))


def goes_on(tokenizer: Tokenizer, token_id: int) -> bool:
    """Whether a token goes on with the word in front of it: with a letter or digit and no space between, or as nothing that
    is seen.
    """
    text: str = tokenizer.decode([token_id], skip_special_tokens=True)
    if isinstance(tokenizer.model, models.WordPiece):
        return not text or text.startswith("##")
    return not text or text[0].isalnum() or text[0] == "\N{REPLACEMENT CHARACTER}"  # part of a character


def tokenize(tokenizer: Tokenizer, spec: TextSpec, captions: Sequence[str]) -> list[list[int]]:
    """One row a caption, prepared as the spec says: [DEC] prompt caption [SEP].

    A long caption loses its last tokens, never [SEP]: max_tokens counts all four parts, as in BLIP. One call with many
    captions costs a fraction of many calls. Raises ValueError if the prompt leaves no room.
    """
    start = prompt_ids(tokenizer, spec)
    room = spec.max_tokens - len(start) - 1
    if room < 1:
        raise ValueError(
            f"max_tokens={spec.max_tokens} leaves no room for a caption: the first token, the prompt {spec.prompt!r} "
            f"and the end token take {len(start) + 1}; raise max_tokens or shorten the prompt"
        )
    texts = [clean_caption(caption, spec.max_words, clean=spec.clean) for caption in captions]
    return [[*start, *ids[:room], spec.eos_id] for ids in _encode_all(tokenizer, texts)]


def unknown_words(tokenizer: Tokenizer, spec: TextSpec, captions: Sequence[str]) -> tuple[float, list[str]]:
    """The share of the captions' own tokens that stand for what the tokenizer does not know, and the words that hold them."""
    unknown: int | None = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or UNK)
    if unknown is None:  # bytes spell everything
        return 0.0, []
    texts = [clean_caption(caption, spec.max_words, clean=spec.clean) for caption in captions]
    rows = _encode_all(tokenizer, texts)
    num_unknown = sum(row.count(unknown) for row in rows)
    words = {word: None for text, row in zip(texts, rows, strict=True) if unknown in row for word in text.split()}
    return num_unknown / max(1, sum(map(len, rows))), [word for word in words if unknown in _encode(tokenizer, word)]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, whose words have one space between them; a special token's name in it is only text.

    encode_batch is not used: it starts a thread per core, and every training worker and data task already has its cores;
    without threads it is no faster than one text after the other. Instead, where a word's ids do not depend on its
    neighbours, each different word of all texts is encoded once.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    names = sorted((token.content for token in added if token.special), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, names)) or "(?!)", re.IGNORECASE)

    def plain(text: str) -> str:
        return special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    words_of_texts = [text.split(" ") for text in texts]
    words = list(dict.fromkeys(chain.from_iterable(words_of_texts)))
    few = len(words) < 0.8 * sum(map(len, words_of_texts))  # else finding the words again costs more than it saves
    if not few or not _encodes_by_word(tokenizer) or any(" " in token.content for token in added):
        return [_encode(tokenizer, plain(text)) for text in texts]
    ids_of_words = dict(zip(words, _encode_words(tokenizer, [plain(word) for word in words]), strict=True))
    return [list(chain.from_iterable(map(ids_of_words.__getitem__, words))) for words in words_of_texts]


def _encode_words(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The ids of each word, from one encoding of all: a token belongs to the word in which its first character lies."""
    encoding = tokenizer.encode(" ".join(words), add_special_tokens=False)
    rows: list[list[int]] = [[] for _ in words]
    ends = list(accumulate(len(word) + 1 for word in words))
    number = 0
    for token_id, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
        while start >= ends[number]:
            number += 1
        rows[number].append(token_id)
    return rows


def _encodes_by_word(tokenizer: Tokenizer) -> bool:
    """Whether a word has the same ids in every text: so it is for BERT's rules, which nothing cuts or pads."""
    return (
        isinstance(tokenizer.normalizer, normalizers.BertNormalizer)
        and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and tokenizer.truncation is None
        and tokenizer.padding is None
    )


def collate(
    rows: Sequence[Sequence[int]], spec: TextSpec, num_prompt_tokens: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(input_ids, labels), both (N, L), padded on the right to the longest row.

    num_prompt_tokens: len(prompt_ids(...)). labels are input_ids, not shifted (as in Hugging Face), and IGNORED on the
    prompt and the padding.
    """
    input_ids = np.full((len(rows), max(map(len, rows), default=0)), spec.pad_id, np.int64)
    labels = np.full_like(input_ids, IGNORED)
    for n, row in enumerate(rows):
        input_ids[n, : len(row)] = row
        labels[n, num_prompt_tokens : len(row)] = row[num_prompt_tokens:]
    return input_ids, labels


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of generated ids, without special tokens and without ids that the tokenizer does not name."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip()


def save_tokenizer(tokenizer: Tokenizer, spec: TextSpec, folder: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json into a local folder; of a WordPiece tokenizer
    also vocab.txt, of a byte-level BPE vocab.json and merges.txt.

    transformers loads it with equal ids (AutoTokenizer, BertTokenizer, GPT2Tokenizer); tokenizer.json alone is what raycap
    reads.
    """
    wordpiece, bpe = (isinstance(tokenizer.model, kind) for kind in (models.WordPiece, models.BPE))
    names = {"unk_token": UNK, "sep_token": SEP, "cls_token": CLS, "mask_token": MASK} if wordpiece else {}
    roles = {role: token for role, token in names.items() if tokenizer.token_to_id(token) is not None}
    for role, token_id in (("bos_token", spec.bos_id), ("eos_token", spec.eos_id), ("pad_token", spec.pad_id)):
        if (token := tokenizer.id_to_token(token_id)) is not None:  # BLIP's published tokenizers do not name [DEC]
            roles[role] = token
    if bpe:
        roles["unk_token"] = roles.get("eos_token", END_OF_TEXT)  # GPT2Tokenizer wants one; bytes need none
    special = {**roles, "additional_special_tokens": [ENC] if tokenizer.token_to_id(ENC) is not None else []}
    kind = "BertTokenizer" if wordpiece else "GPT2Tokenizer" if bpe else "PreTrainedTokenizerFast"
    config = {"tokenizer_class": kind, "model_max_length": 512 if wordpiece else 1024, **special}
    if wordpiece:
        config["do_lower_case"] = True
    for name, content in (
        ("tokenizer.json", tokenizer.to_str(pretty=True)),
        ("tokenizer_config.json", json.dumps(config, indent=2)),
        ("special_tokens_map.json", json.dumps(special, indent=2)),
    ):
        (Path(folder) / name).write_text(content + "\n", encoding="utf-8")
    if wordpiece:
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        text = "\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n"
        (Path(folder) / "vocab.txt").write_text(text, encoding="utf-8")
    if bpe:
        tokenizer.model.save(folder)


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a folder in transformers' layout (path or s3:// URL) or of a model on the Hugging Face Hub.

    It is tokenizer.json; of a folder without one, BERT's vocab.txt, or GPT-2's vocab.json and merges.txt. Raises
    CheckpointError if there is none of these or it cannot be read.
    """
    if storage.is_url(source) or Path(source).is_absolute() or Path(source).is_dir():
        folder = source if storage.is_url(source) else str(Path(source).absolute())
        try:
            return _from_folder(folder, source)
        except StorageError as e:
            raise CheckpointError(f"cannot load the tokenizer of '{source}': {e}") from e
    from huggingface_hub import hf_hub_download

    try:
        return _parse(Path(hf_hub_download(source, "tokenizer.json")).read_bytes(), source)
    except (OSError, ValueError) as e:  # no network, no such name, or no valid name: its errors derive from these
        raise CheckpointError(
            f"cannot load the tokenizer '{source}' from the Hugging Face Hub: {str(e).partition(chr(10))[0]}; pass the "
            f"absolute path of a folder with tokenizer.json"
        ) from e


def tokenizer_files(folder: str) -> list[str]:
    """The files of a folder that load_tokenizer makes its tokenizer of. Raises StorageError."""
    made_of = (["tokenizer.json"], ["vocab.txt"], ["vocab.json", "merges.txt"])
    names = next((n for n in made_of if all(storage.exists(storage.join(folder, name)) for name in n)), made_of[0])
    also = ("special_tokens_map.json", "tokenizer_config.json")
    return names + [name for name in also if storage.exists(storage.join(folder, name))]


def _from_folder(folder: str, source: str) -> Tokenizer:
    files = {name: storage.read_bytes(storage.join(folder, name)) for name in tokenizer_files(folder)}
    for name, data in files.items():
        if storage.is_lfs_pointer(data):
            raise CheckpointError(f"{name!r} of {source!r} is a Git LFS pointer: fetch the file with `git lfs pull`")
    try:
        about = [
            json.loads(files[name]) for name in ("tokenizer_config.json", "special_tokens_map.json") if name in files
        ]
        about = [content for content in about if isinstance(content, dict)]
        if "vocab.txt" in files:
            lower = next((content["do_lower_case"] for content in about if "do_lower_case" in content), True)
            tokenizer = _wordpiece(files["vocab.txt"].decode().splitlines(), lowercase=bool(lower))
        elif "vocab.json" in files:
            tokenizer = _byte_level(json.loads(files["vocab.json"]), files["merges.txt"].decode())
        else:
            tokenizer = _parse(files["tokenizer.json"], source)
    except (ValueError, TypeError, AttributeError, IndexError) as e:
        raise CheckpointError(f"cannot load the tokenizer of '{source}': {e}; write that folder again") from e
    known = [name for name in _special_names(about) if tokenizer.token_to_id(name) is not None]
    tokenizer.add_special_tokens(sorted(known))  # which tokenizer.json need not say: they are skipped in captions
    return tokenizer


def _wordpiece(words: list[str], *, lowercase: bool) -> Tokenizer:
    """As BERT's own tokenizer makes it of vocab.txt."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens([name for name in (PAD, UNK, CLS, SEP, MASK) if name in words])
    return tokenizer


def _byte_level(vocab: dict[str, int], merges: str) -> Tokenizer:
    """As GPT-2's own tokenizer makes it of vocab.json and merges.txt."""
    pairs = [line.split(" ") for line in merges.splitlines() if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(first, second) for first, second in pairs]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocab:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _special_names(about: list[dict[str, Any]]) -> set[str]:
    """Names of special tokens in special_tokens_map.json and tokenizer_config.json, without that of the end, which may be a word
    (ClipCap's is "."): nothing that is said comes after it.
    """
    roles = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "bos_token")
    given: list[Any] = []
    for content in about:
        given += [content.get(role) for role in roles]
        for several in ("additional_special_tokens", "extra_special_tokens"):
            given += content[several] if isinstance(content.get(several), list) else []
        added = content.get("added_tokens_decoder")
        given += [
            token for token in (added.values() if isinstance(added, dict) else ()) if _field(token, "special") is True
        ]
    ends = {_field(content.get("eos_token"), "content") for content in about}
    names = {_field(token, "content") for token in given}
    return {name for name in names - ends if isinstance(name, str) and name}


def _field(token: Any, name: str) -> Any:
    """Of a token that a file holds as its text or as an object."""
    return (
        token.get(name) if isinstance(token, dict) else token if name == "content" and isinstance(token, str) else None
    )


def _parse(data: bytes, source: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as e:  # the library raises bare Exception
        raise CheckpointError(
            f"cannot load the tokenizer of '{source}': tokenizer.json is damaged ({e}); write that folder again"
        ) from e
    tokenizer.no_padding()  # whoever saved it may have left either on; raycap cuts and pads by itself
    tokenizer.no_truncation()
    return tokenizer
