"""What every reader of a data set returns, and the rules they share: tidy captions, keys, what was skipped and why."""

import bisect
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

from raycap.errors import UserError
from raycap.schema import SampleRef

MAX_SKIPPED_KEYS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRead:
    """The samples of a data set, and what became no sample or no caption.

    samples: to be iterated once. A tuple, or for Conceptual Captions a stream that reads the file as it goes; then
    `skipped` and `skipped_keys` are complete when it has ended.
    skipped: reason -> count. unusable: those of them that annotations do not leave empty, but a reader cannot use: they count
    against --max-error-rate. skipped_keys: the MAX_SKIPPED_KEYS first (key, reason) in the order of keys, so that they do
    not depend on the order of the file; a key is what the annotations call the entry.
    """

    samples: Iterable[SampleRef]
    skipped: Counter[str] = field(default_factory=Counter)
    unusable: Counter[str] = field(default_factory=Counter)
    skipped_keys: list[tuple[str, str]] = field(default_factory=list)

    def skip(self, key: str, reason: str, *, unusable: bool = False) -> None:
        """Counts one entry."""
        self.skipped[reason] += 1
        if unusable:
            self.unusable[reason] += 1
        entry = (printable(key), reason)
        if len(self.skipped_keys) < MAX_SKIPPED_KEYS or entry < self.skipped_keys[-1]:
            bisect.insort(self.skipped_keys, entry)
            del self.skipped_keys[MAX_SKIPPED_KEYS:]

    def describe_skipped(self) -> str:
        """`reason: count, ...`, or 'nothing'."""
        return ", ".join(f"{reason}: {count}" for reason, count in sorted(self.skipped.items())) or "nothing"


def tidy(text: Any) -> str:
    """The caption on one line, without surrounding and repeated whitespace; "" for what is no text in Unicode."""
    return " ".join(text.split()) if isinstance(text, str) and is_unicode(text) else ""


def is_empty(text: Any) -> bool:
    """Whether annotations leave a caption empty, and do not hold something else in its place."""
    return text is None or (isinstance(text, str) and not text.strip())


def is_unicode(text: str) -> bool:
    """False for a name that was not UTF-8 and for half a surrogate pair, neither of which any file could hold as text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """The text with the bytes that were not UTF-8 written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def key_of(name: str) -> str:
    """The key of an image file: its path below the root without suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def keys_of(names: Collection[str]) -> dict[str, str]:
    """The key of each of these image files: without its suffix, unless another one has the same stem."""
    stems = Counter(map(key_of, set(names)))
    return {name: name if stems[key_of(name)] > 1 else key_of(name) for name in names}


def locate(
    names: Collection[str], present: Collection[str], images: str, *, by_last_part: bool = False
) -> dict[str, str]:
    """name -> path below the folder or URL `images`, of the names that are there in one of the forms that annotations
    have: as it is, with backslashes, as an absolute path below `images`, below the folder that `images` ends with, or as
    the last part of a path or URL of somebody else; by_last_part: of any name.

    Raises UserError for two such names of which nothing but the last part is the same.
    """
    found: dict[str, str] = {}
    guessed: dict[str, str] = {}  # path -> the name whose last part it is
    for name in names:
        path = next((form for form in _forms(name, images) if form in present), None)
        if path is None:
            last = next((form for form in _last_parts(name, by_last_part) if form in present), None)
            if last is not None and guessed.setdefault(last, name) != name:
                raise UserError(
                    f"'{printable(guessed[last])}' and '{printable(name)}' end alike, and below '{images}' there is one '{last}' for both; give "
                    f"the folder that holds their folders, or write names that are below it"
                )
            path = last
        if path is not None:
            found[name] = path
    return found


def _forms(name: str, images: str) -> Iterator[str]:
    yield name
    plain, root = name.replace("\\", "/"), images.rstrip("/")
    yield str(PurePosixPath(plain))
    for above in (f"{root}/", f"{root.rpartition('/')[2]}/"):
        if plain.startswith(above):
            yield str(PurePosixPath(plain.removeprefix(above)))


def _last_parts(name: str, of_any: bool) -> Iterator[str]:
    plain = name.replace("\\", "/")
    if of_any or plain.startswith("/") or ":/" in plain:
        last = plain.rpartition("/")[2]
        yield last
        yield unquote(last.partition("?")[0])


def refuse_missing(names: Collection[str], present: Collection[str], annotations: str, images: str) -> None:
    """Raises UserError naming the first of these images that are not below the folder or URL `images`."""
    missing = [name for name in names if name not in present]
    if missing:
        some = ", ".join(f"'{printable(name)}'" for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of the {len(names)} images of '{annotations}' are missing below '{images}': {some}; pass "
            f"the folder that the file names are relative to, or complete the download"
        )


def refuse_split(split: str, annotations: str, kind: str) -> None:
    """Raises UserError if a split is asked of a file that has only one."""
    if split:
        raise UserError(
            f"'{annotations}' is a {kind} file, which holds one split, so --split {split!r} has no meaning; leave it out "
            f"or pass another file"
        )
