"""Output that must exist exactly once: units with fixed names, created once, then a marker written last.

Owns the protocol that shards, feature caches, bulk captions and filtered sets share; not what a unit holds.

1. claim   the run's plan is created first; a run with another plan is refused
2. commit  each unit is created under a name that follows from the plan alone, so no second copy can exist
3. done    a run that starts again lists the units there are and makes the others
4. seal    when all units exist, the marker says so; readers trust a folder only by its marker

Nothing here depends on a clock, a lease or on which process ran what: two runs at once, or a worker that outlives its
driver, make the same units under the same names, and one of them wins.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap import storage
from raycap.errors import StorageError

if TYPE_CHECKING:
    import pyarrow as pa

README = "README.md"
_DTYPES = {"float": "float32", "double": "float64", "binary": "image"}  # Arrow's name -> that of `datasets`


def claim(url: str, plan: dict[str, Any]) -> None:
    """Create the plan file, or accept an equal one. plan: flat, JSON values.

    Raises StorageError naming the values that differ if the output was begun with another plan.
    """
    data = (json.dumps(plan, indent=1, sort_keys=True) + "\n").encode()
    if storage.put_new(url, data):
        return
    found = storage.read_bytes(url)
    if found == data:
        return
    try:
        begun = json.loads(found)
        names = sorted(name for name in begun.keys() | plan.keys() if begun.get(name) != plan.get(name))
    except (ValueError, AttributeError):
        raise StorageError(f"{url!r} is not the plan of an output of raycap; choose another --out") from None
    there = ", ".join(f"{name}={begun.get(name)!r}" for name in names)
    here = ", ".join(f"{name}={plan.get(name)!r}" for name in names)
    raise StorageError(
        f"cannot continue the output of {url!r}: it was begun with {there} and this command has {here}; "
        f"repeat the first command or choose another --out"
    )


def commit(url: str, data: bytes) -> bool:
    """Create the unit: True if this call did, False if it was there with the same bytes.

    So a unit made twice, by a retry or by another run of the same plan, is fine. Raises StorageError if the unit exists
    with other bytes.
    """
    if storage.put_new(url, data):
        return True
    found = storage.read_bytes(url)
    if found == data:
        return False
    folder, _, name = url.rpartition("/")
    raise StorageError(
        f"cannot commit unit {name!r}: {folder!r} holds another run's {name!r} ({_describe(found)}, not "
        f"{_describe(data)}); choose another --out"
    )


def commit_first(url: str, data: bytes) -> bool:
    """Create the unit: True if this call did, False if it was there, with whatever bytes.

    For units whose last digits depend on where they were computed: a score differs between a GPU and a CPU, or between
    two numbers of threads, so equal bytes cannot be asked for. What says that the unit there belongs to this output is
    the plan that every run of it had to claim.
    """
    return storage.put_new(url, data)


def describe(
    root: str, path: str, split: str, about: str, schema: "pa.Schema | None" = None, *, renew: bool = False
) -> None:
    """Creates README.md in root, if there is none: the head by which Hugging Face's `datasets` finds the data among the other files.

    path: of the data files below root, as a pattern. about: one sentence. schema: of files whose columns show only in part in the
    first rows, by which they are guessed; binary columns are images. renew: also in the place of one that this wrote before.
    """
    begin = "configs:\n- config_name: default\n"
    head = f'configs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: "{path}"\n'
    if schema is not None:
        head += "dataset_info:\n  features:\n" + _features(schema, "  ")
    url, content = storage.join(root, README), f"---\n{head}---\n{about}\n".encode()
    if not storage.put_new(url, content) and renew and storage.read_bytes(url).startswith(f"---\n{begin}".encode()):
        storage.put(url, content)


def _features(columns: "Iterable[pa.Field]", indent: str) -> str:
    """The columns as `datasets` writes them into a README."""
    import pyarrow as pa

    lines = ""
    for column in columns:
        kind, word = column.type, "dtype"
        if pa.types.is_list(kind):
            kind, word = kind.value_type, "list"
        lines += f"{indent}- name: {column.name}\n"
        if pa.types.is_struct(kind):
            word = word if word == "list" else "struct"
            lines += f"{indent}  {word}:\n{_features(kind, indent + '  ')}"
        else:
            lines += f"{indent}  {word}: {_DTYPES.get(str(kind), str(kind))}\n"
    return lines


def done(root: str, suffix: str) -> set[str]:
    """Names of the units below root, without suffix: the files that end with it. Empty if root does not exist yet."""
    if not storage.is_url(root) and not Path(root).exists():
        return set()
    return {name[: -len(suffix)] for name in storage.list_files(root) if name.endswith(suffix)}


def seal(root: str, name: str, data: bytes) -> None:
    """Create the marker `name` in root. To be called when every unit exists. Refused like commit."""
    commit(storage.join(root, name), data)


def _describe(data: bytes) -> str:
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:12]}"
