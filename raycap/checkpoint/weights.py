"""Weights: from safetensors files, into a model, and out of one. No other format is read."""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from raycap.checkpoint.fit import Weights, file_names, fitted, tensors_of
from raycap.checkpoint.folder import in_short, read_json, refuse_pointer, shown
from raycap.checkpoint.spec import CheckpointSpec, check_spec
from raycap.errors import CheckpointError
from raycap.models import TIED_NAMES, CaptionModel, build_model

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files: {"weight_map": {tensor: file}}
# 80,000 tensors; BLIP base has 475 in 55 KB. The library parses up to 100 MB, in ten times the memory.
MAX_HEADER_BYTES = 8 * 2**20
CHUNK_BYTES = 4 * 2**20  # small enough that what was read is still in the CPU's cache when it is hashed
DTYPES = {  # the format's names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write_weights(folder: Path, weights: Weights) -> None:
    """model.safetensors, which everybody may read. Raises OSError, SafetensorError.

    A tied tensor of BLIP stands in it under both names: transformers 4.26 to 4.55 do not tie them, and draw at random what they
    do not find.
    """
    twice = {
        second: weights[first].clone()
        for second, first in TIED_NAMES["blip"].items()
        if first in weights and second not in weights
    }
    tensors = {name: tensor.contiguous() for name, tensor in {**weights, **twice}.items()}
    save_file(tensors, folder / WHOLE, metadata={"format": "pt"})
    (folder / WHOLE).chmod(0o644)  # the library writes 0600, which locks out others on shared storage


def has_safetensors(folder: Path) -> bool:
    return any((folder / name).exists() for name in (WHOLE, INDEX))


def weight_files(folder: Path, source: str) -> tuple[list[str], dict[str, str]]:
    """Names of the safetensors files of a folder in Hugging Face's layout, and which tensor the index says is in which.

    Raises CheckpointError for a folder that has none, and for an index that names other files than of this folder.
    """
    if (folder / WHOLE).exists():
        return [WHOLE], {}
    if not has_safetensors(folder):
        raise CheckpointError(
            f"{source!r} holds no {WHOLE} and no {INDEX}; if it holds pytorch_model.bin, whole or in parts, which no door "
            f"unpickles, convert it: jobs/import_weights.py --weights {source} --out FOLDER"
        )
    index = read_json(folder / INDEX, source).get("weight_map")
    weight_map = {name: str(file) for name, file in index.items()} if isinstance(index, dict) else {}
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise CheckpointError(
                f"{INDEX} of {source!r} names {shown(name)}, which is not in that folder; copy it again"
            )
    if not files:
        raise CheckpointError(f"{INDEX} of {source!r} names no file; copy it again")
    return files, weight_map


def read_weights(paths: Sequence[Path], source: str, weight_map: Mapping[str, str] | None = None) -> Weights:
    """The tensors of all these files: see read_file. weight_map: what each file must hold. Raises CheckpointError."""
    return read_and_hash(paths, source, weight_map)[0]


def read_and_hash(
    paths: Sequence[Path], source: str, weight_map: Mapping[str, str] | None = None, *, keep: bool = True
) -> tuple[Weights, dict[str, str]]:
    """What read_weights returns, and the sha256 (hex) of each file by its name. keep: see read_file."""
    weights: dict[str, Tensor] = {}
    digests = {}
    for path in paths:
        tensors, digests[path.name] = read_file(path, source, keep=keep)
        for name in weight_map or ():
            if weight_map and (weight_map[name] == path.name) != (name in tensors):
                raise CheckpointError(
                    f"{path.name!r} of {source!r} does not hold what its {INDEX} says (first: {shown(name)}); copy the folder again"
                )
        weights |= tensors
    return weights, digests


def read_file(path: Path, source: str, *, keep: bool = True) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file, each in memory of its own, and the sha256 (hex) of the bytes that they were made of.

    The file is read once and never mapped: one that changes or vanishes later changes no tensor. It is hashed by a second
    thread while it is read. Without keep the tensors are on the meta device, and next to no memory is taken. Raises
    CheckpointError.
    """
    digest = hashlib.sha256()
    tensors = {}
    refuse_pointer(path, source)
    try:
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as hashing:

            def fill(buffer: memoryview) -> None:
                while buffer:
                    num_read = file.readinto(buffer[:CHUNK_BYTES])
                    if not num_read:
                        raise SafetensorError("it ends too early")
                    hashed = hashing.submit(digest.update, buffer[:num_read])
                    buffer = buffer[num_read:]
                    if not keep:
                        hashed.result()  # or what was read would pile up

            def skip(num_bytes: int) -> None:
                for first in range(0, num_bytes, CHUNK_BYTES):
                    fill(memoryview(bytearray(min(CHUNK_BYTES, num_bytes - first))))

            fill(memoryview(prefix := bytearray(8)))
            num_header_bytes = int.from_bytes(prefix, "little")
            if num_header_bytes > MAX_HEADER_BYTES:
                raise SafetensorError(f"its header of {num_header_bytes} bytes is longer than {MAX_HEADER_BYTES}")
            with safe_open(path, "pt"):
                pass  # the library refuses what is no safetensors file
            fill(memoryview(header := bytearray(num_header_bytes)))
            # Read again here, so that the tensors are cut as the bytes say that were hashed.
            entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
            for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
                begin, end = entry["data_offsets"]
                if entry["dtype"] not in DTYPES:
                    raise SafetensorError(f"{shown(name)} holds values of type {shown(entry['dtype'])}")
                flat = torch.empty(end - begin, dtype=torch.uint8, device="cpu" if keep else "meta")
                if keep:
                    fill(flat.numpy().data)
                else:
                    skip(end - begin)
                tensors[name] = flat.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            if file.read(1):
                raise SafetensorError("it goes on behind its last tensor")
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name!r} of {source!r} cannot be read ({in_short(error)}); copy the file again"
        ) from error
    return tensors, digest.hexdigest()


def load_model(spec: CheckpointSpec, weights: Weights, source: str) -> CaptionModel:
    """The model of a checkpoint, on the CPU, in float32.

    Its parameters are the very tensors of `weights` where these are float32 already: no second copy is made, so training
    the model changes them. Raises CheckpointError if the weights are not those of its config, or are not finite. Nothing
    of the size that a config asks for is allocated before the weights were found to be of that size.
    """
    check_spec(spec, source)
    outline = _outline(spec, source)
    own, given = tensors_of(outline), fitted(outline, weights, source)
    found = {id(tensor): name for name, tensor in own.items() if name in given}
    loaded: dict[int, Tensor] = {}  # by the identity of the tensor in the outline, so that tied names share one
    taken: set[int] = set()
    for name, tensor in given.items():
        single = _in_memory_of_its_own(tensor, taken)
        # A sum is not finite if one value is not; it is quick, and may overflow where all values are finite.
        if not math.isfinite(single.sum()) and not bool(single.isfinite().all()):
            raise CheckpointError(
                f"the weights of {source!r} are broken: {shown(name)} holds values that are infinite or NaN; choose another checkpoint"
            )
        if found[id(own[name])] != name and not torch.equal(tensor, given[found[id(own[name])]]):
            raise CheckpointError(
                f"{name!r} and {found[id(own[name])]!r} in the weights of {source!r} differ, which its config.json makes one tensor; "
                f"set tie_word_embeddings to false there"
            )
        if found[id(own[name])] == name:
            frozen = isinstance(own[name], nn.Parameter) and not own[name].requires_grad
            loaded[id(own[name])] = nn.Parameter(single, requires_grad=not frozen)
    # Once more, for what is in no file and comes of the constructors: buffers, and numbers made of tensors.
    with _Uninitialised(), _parameters_without_memory():
        model = _built(spec, source)
    model.load_state_dict({name: loaded[id(tensor)] for name, tensor in own.items()}, assign=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), "every parameter is in a file"
    return model


def check_weights(spec: CheckpointSpec, weights: Weights, source: str) -> None:
    """Raises CheckpointError if the weights, which may be on the meta device, are not those of the config by name and shape."""
    fitted(_outline(spec, source), weights, source)


def _outline(spec: CheckpointSpec, source: str) -> CaptionModel:
    """The model on the meta device: names and shapes."""
    with torch.device("meta"), _Uninitialised():
        return _built(spec, source)


def _in_memory_of_its_own(tensor: Tensor, taken: set[int]) -> Tensor:
    """The values in float32, row by row: the tensor itself if it is that and no part of another one. taken: addresses in use."""
    single = tensor.detach().to("cpu", torch.float32).contiguous()
    if single.untyped_storage().nbytes() != single.nbytes or single.data_ptr() in taken:
        single = single.clone()
    taken.add(single.data_ptr())
    return single


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Modules that this thread makes inside keep the shapes of their parameters alone; all other tensors are as ever."""
    thread = threading.get_ident()

    def drop(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None  # keeps it: a tied parameter must stay the same object
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    # torch's annotation leaves out what a hook may return.
    hook = register_module_parameter_registration_hook(drop)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _built(spec: CheckpointSpec, source: str) -> CaptionModel:
    try:
        return build_model(spec.kind, spec.model_config)
    except Exception as error:  # transformers' config classes and torch's modules raise a dozen types at odd values
        raise CheckpointError(
            f"no {spec.kind} model can be built from config.json of {source!r} ({in_short(error)}); copy it again"
        ) from error


class _Uninitialised(TorchFunctionMode):
    """Modules made inside draw no fresh weights: that takes seconds, and on the meta device loads torch's compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        module, name = getattr(func, "__module__", ""), getattr(func, "__name__", "")
        if name in ("normal_", "uniform_") and args and not args[0].is_meta:
            with torch.no_grad():  # trunc_normal_ draws again until all values lie within its bounds
                return args[0].zero_()
        if module == "torch.nn.init" or name in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def export_weights(model: nn.Module) -> dict[str, Tensor]:
    """fp32 CPU copies of a model's weights by their names in files, each shared tensor once under its first name, as safetensors
    wants it.
    """
    state, names = model.state_dict(), file_names(model)
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        seen.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {names[name]: state[name].detach().to("cpu", torch.float32, copy=True) for name in seen.values()}
