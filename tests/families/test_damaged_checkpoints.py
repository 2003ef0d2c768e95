"""Checkpoints that are damaged or meant to harm: each is refused by one sentence that names the file, and no code of theirs runs."""

import json
import pickle
import re
import resource
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_json, png_images
from tiny_families import FAMILIES, TEXT, TOKENIZER, write_family
from tokenizers import Tokenizer
from torch import Tensor

from raycap.captioner import Captioner
from raycap.checkpoint import SEAL
from raycap.checkpoint.folder import sha256_of_file, sha256_of_json, write_json
from raycap.config import ImportConfig
from raycap.errors import EXIT_USER_MISTAKE, CheckpointError
from raycap.text import END_OF_TEXT, save_tokenizer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.* is unverified", "ignore:.* is a pickled file")

PUBLISHED = ("blip", "clip_gpt2", "vit_gpt2")  # families whose folders need no seal
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WHAT_TO_DO = re.compile(r"; [^;]*\b(copy|choose|give|check|convert|install|correct|write|train)\b[^;]*$")
PAGE = "x" * 5000
LONGEST = 600  # characters of a sentence, without the folder's name


class Payload:
    """What a pickle can do to those who load it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    return {name: write_family(root / name, name) for name in FAMILIES}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What exists if anything of a checkpoint ran."""
    return tmp_path / "ran"


def copy_of(folder: Path, tmp_path: Path, *, sealed: bool) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder, copy)
    if not sealed:
        (copy / SEAL).unlink()
    return copy


def refused(load: Callable[[], object], *names: str) -> str:
    """The sentence with which it is refused, which holds these names and what to do."""
    with pytest.raises(CheckpointError) as caught:
        load()
    sentence = str(caught.value)
    assert caught.value.exit_code == EXIT_USER_MISTAKE
    assert all(name in sentence for name in names), sentence
    assert "\n" not in sentence
    assert not re.search(r"\. [A-Z]", sentence), sentence
    assert WHAT_TO_DO.search(sentence), sentence
    assert len(sentence.replace(names[0], "")) < LONGEST, sentence
    return sentence


# ---- What is done to a folder; `named` is what the sentence says beside the folder.


@dataclass(frozen=True)
class Damage:
    do: Callable[[Path, Path], object]  # (folder, marker)
    file: str  # that is damaged
    named: str = ""  # in the sentence about a folder without a seal; the file, if empty
    families: tuple[str, ...] = FAMILIES


def payload_in(name: str) -> Damage:
    def do(folder: Path, marker: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(Payload(marker)))

    return Damage(do, name)


def torch_file(folder: Path, marker: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2), "b": Payload(marker)}}, folder / WEIGHTS)


def only_pickled(folder: Path, marker: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))


def pickled_index(folder: Path, marker: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_bytes(pickle.dumps(Payload(marker)))


def index_of(*files: str) -> Callable[[Path, Path], None]:
    """The weights in these files, of which the last one holds them."""

    def do(folder: Path, _marker: Path) -> None:
        names = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder / files[-1])
        weight_map = {name: files[i % len(files)] for i, name in enumerate(names)}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return do


def weights(change: Callable[[dict[str, Tensor], str], object]) -> Callable[[Path, Path], None]:
    """change: of all tensors, given with the name of one that has two dimensions."""

    def do(folder: Path, _marker: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        name = next(name for name, tensor in sorted(tensors.items()) if tensor.ndim == 2)
        change(tensors, name)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return do


def bytes_of(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Callable[[Path, Path], None]:
    def do(folder: Path, _marker: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return do


def header(text: bytes, num_data: int = 0, length: int | None = None) -> Callable[[Path, Path], None]:
    """A safetensors file of this header, which it says to be so long."""
    return bytes_of(lambda _: struct.pack("<Q", len(text) if length is None else length) + text + bytes(num_data))


def huge_header(folder: Path, _marker: Path) -> None:
    size = 100_000_000
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", size) + b"{")
        file.truncate(8 + size)  # a hole of zeros


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], None]:
    return lambda folder, _marker: edit_json(folder / "config.json", change)


def preprocessing(**changes: Any) -> Damage:
    name = "preprocessor_config.json"
    return Damage(lambda folder, _: edit_json(folder / name, lambda c: c.update(changes)), name)


def generation(**changes: Any) -> Damage:
    name = "generation_config.json"
    return Damage(lambda folder, _: edit_json(folder / name, lambda c: c.update(changes)), name)


def text_in(name: str, text: str) -> Callable[[Path, Path], object]:
    return lambda folder, _marker: (folder / name).write_text(text)


def without_tokenizer(folder: Path) -> None:
    """Without what it could be made of, too."""
    for name in ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)


def folder_in_place_of(name: str) -> Damage:
    def do(folder: Path, _marker: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return Damage(do, name)


def local_code(folder: Path, marker: Path) -> None:
    (folder / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForImageTextToText": "mine.Model"}
    edit_json(folder / "config.json", lambda c: c.update(auto_map=auto_map))


def widest(content: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that has the width of a text model."""
    return content.get("text_config") or content.get("decoder") or content


def width_of(value: object) -> Callable[[Path, Path], None]:
    def change(content: dict[str, Any]) -> None:
        part = widest(content)
        part["n_embd" if "n_embd" in part else "hidden_size"] = value

    return config(change)


def of_another_family(name: str) -> Callable[[Path, Path], None]:
    def do(folder: Path, marker: Path) -> None:
        other = "vit_gpt2" if "vision_model" in (folder / "config.json").read_text() else "blip"
        write_family(marker.parent / other, other)
        shutil.copy(marker.parent / other / name, folder / name)

    return do


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share)]


ONE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}%s}'
DAMAGES = {
    "a payload as weights": payload_in(WEIGHTS),
    "a payload in a torch file as weights": Damage(torch_file, WEIGHTS),
    "a payload as tokenizer": payload_in("tokenizer.json"),
    "a payload as configuration": payload_in("config.json"),
    "a payload as preprocessing": payload_in("preprocessor_config.json"),
    "a payload as generation settings": payload_in("generation_config.json"),
    "a payload instead of weights": Damage(only_pickled, WEIGHTS),
    "a payload as index": Damage(pickled_index, WEIGHTS, INDEX),
    "an index that leads out of the folder": Damage(index_of("../x.safetensors"), WEIGHTS, "'../x.safetensors'"),
    "an index that names a file that is none": Damage(index_of("a.safetensors", "b.safetensors"), WEIGHTS, INDEX),
    "an index that names a pickle": Damage(index_of("pytorch_model.bin"), WEIGHTS, "'pytorch_model.bin'"),
    "code of another repository": Damage(
        config(lambda c: c.update(auto_map={"AutoConfig": "someone/evil--configuration.Config"})), "config.json"
    ),
    "code in the folder": Damage(local_code, "config.json"),
    "a tensor of another shape": Damage(weights(lambda t, n: t.update({n: torch.zeros(3, 5)})), WEIGHTS, "config.json"),
    "a tensor that is turned": Damage(
        weights(lambda t, n: t.update({n: torch.zeros(t[n].shape[0] + 1, *t[n].shape[1:])})), WEIGHTS, "config.json"
    ),
    "a missing tensor": Damage(weights(lambda t, n: t.pop(n)), WEIGHTS, "1 missing"),
    "a tensor that nobody knows": Damage(weights(lambda t, _: t.update(x=torch.ones(2))), WEIGHTS, "first: 'x'"),
    "no tensor at all": Damage(weights(lambda t, _: t.clear()), WEIGHTS, "config.json"),
    "a NaN": Damage(weights(lambda t, n: t[n].view(-1)[-1:].fill_(torch.nan)), WEIGHTS, "infinite or NaN"),
    "an infinite weight": Damage(weights(lambda t, n: t[n].view(-1)[:1].fill_(-torch.inf)), WEIGHTS, "infinite or NaN"),
    "integers as weights": Damage(weights(lambda t, n: t.update({n: t[n].long()})), WEIGHTS, "config.json"),
    "weights of another family": Damage(of_another_family(WEIGHTS), WEIGHTS, "config.json", PUBLISHED),
    "weights cut in half": Damage(bytes_of(cut(0.5)), WEIGHTS),
    "weights without their last byte": Damage(bytes_of(lambda data: data[:-1]), WEIGHTS),
    "weights with one byte more": Damage(bytes_of(lambda data: data + b"x"), WEIGHTS),
    "an empty file as weights": Damage(bytes_of(lambda _: b""), WEIGHTS),
    "three bytes as weights": Damage(bytes_of(lambda _: b"\x01\x00\x00"), WEIGHTS),
    "a header of 100 MB": Damage(huge_header, WEIGHTS),
    "a header beyond the file": Damage(bytes_of(lambda data: struct.pack("<Q", len(data)) + data[8:]), WEIGHTS),
    "a header of 2**63 bytes": Damage(header(b"{}", length=2**63), WEIGHTS),
    "a header that is no JSON": Damage(header(b"{{{{{{{{"), WEIGHTS),
    "a header that is a list": Damage(header(b"[1,2,3]"), WEIGHTS),
    "a header 20,000 deep": Damage(header(b'{"a":' * 20_000 + b"1" + b"}" * 20_000), WEIGHTS),
    "tensors that share bytes": Damage(
        header(ONE % b',"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}', 12), WEIGHTS
    ),
    "a tensor that ends before it begins": Damage(
        header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', 8), WEIGHTS
    ),
    "a tensor of a type that nobody knows": Damage(
        header(b'{"a":{"dtype":"PICKLE","shape":[2],"data_offsets":[0,8]}}', 8), WEIGHTS
    ),
    "a shape that overflows": Damage(
        header(b'{"a":{"dtype":"F32","shape":[4611686018427387905,4],"data_offsets":[0,16]}}', 16), WEIGHTS
    ),
    "a model a million million wide": Damage(width_of(10**12), "config.json"),
    "a width of nothing": Damage(width_of(0), "config.json"),
    "a width that is a word": Damage(width_of("wide"), "config.json"),
    "a width that is a fraction": Damage(width_of(32.5), "config.json"),
    "an infinite width": Damage(width_of(float("inf")), "config.json"),
    "a width that is no number": Damage(width_of(float("nan")), "config.json"),
    "a width of 5,000 digits": Damage(text_in("config.json", '{"hidden_size": ' + "9" * 5000 + "}"), "config.json"),
    "a configuration 10,000 deep": Damage(text_in("config.json", '{"a":' * 10_000 + "1" + "}" * 10_000), "config.json"),
    "a configuration that is a list": Damage(text_in("config.json", "[]"), "config.json"),
    "a configuration that is empty": Damage(text_in("config.json", ""), "config.json"),
    "a configuration cut in half": Damage(bytes_of(cut(0.5), "config.json"), "config.json"),
    "a configuration in Latin-1": Damage(
        bytes_of(lambda _: '{"é": 1}'.encode("latin-1"), "config.json"), "config.json"
    ),
    "a configuration of nothing": Damage(config(lambda c: c.clear()), "config.json", "type None"),
    "a configuration of another kind": Damage(config(lambda c: c.update(model_type="llama")), "config.json", "'llama'"),
    "a kind that is a list": Damage(config(lambda c: c.update(model_type=["blip"])), "config.json", "['blip']"),
    "a kind that is a page": Damage(config(lambda c: c.update(model_type=PAGE)), "config.json", "xxx"),
    "code named by a page": Damage(config(lambda c: c.update(auto_map={PAGE: PAGE})), "config.json"),
    "a width that is a page": Damage(width_of(PAGE), "config.json"),
    "a size that is a page": preprocessing(size=PAGE),
    "a side below zero": preprocessing(size={"height": -32, "width": -32}),
    "a filter that is a page": preprocessing(resample=PAGE),
    "a filter that is a list": preprocessing(resample=[3]),
    "a scale that is a word": preprocessing(rescale_factor="1/255"),
    "a scale of 400 digits": preprocessing(rescale_factor=10**400),
    "a mean that is no number": preprocessing(image_mean=[0.5, float("nan"), 0.5]),
    "a mean of 400 digits": preprocessing(image_mean=[10**400] * 3),
    "a deviation of zero": preprocessing(image_std=[0.5, 0.5, 0]),
    "a thousand million beams": generation(num_beams=10**9),
    "seven tokens and a half": generation(max_new_tokens=7.5),
    "true beams": generation(num_beams=True),
    "a length penalty that is no number": generation(length_penalty=float("nan")),
    "a length penalty that is a page": generation(length_penalty=PAGE),
    "a configuration of another family": Damage(
        of_another_family("config.json"), "config.json", families=("blip", "vit_gpt2")
    ),
    "a tokenizer cut in half": Damage(bytes_of(cut(0.5), "tokenizer.json"), "tokenizer.json"),
    "a tokenizer 10,000 deep": Damage(text_in("tokenizer.json", '{"model":' * 10_000), "tokenizer.json"),
    "no tokenizer": Damage(lambda folder, _: without_tokenizer(folder), "tokenizer.json"),
    "no configuration": Damage(lambda folder, _: (folder / "config.json").unlink(), "config.json"),
    "no weights": Damage(lambda folder, _: (folder / WEIGHTS).unlink(), WEIGHTS),
    "a folder in place of the tokenizer": Damage(
        lambda folder, _: (without_tokenizer(folder), (folder / "tokenizer.json").mkdir()), "tokenizer.json"
    ),
    "a folder in place of the configuration": folder_in_place_of("config.json"),
    "a folder in place of the weights": folder_in_place_of(WEIGHTS),
    "a folder in place of the preprocessing": folder_in_place_of("preprocessor_config.json"),
}


def cases(families: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(damage, family, id=f"{name}-{family}")
        for name, damage in DAMAGES.items()
        for family in families
        if family in damage.families
    ]


@pytest.mark.parametrize(("damage", "family"), cases(FAMILIES))
def test_a_sealed_folder_is_refused_by_the_name_of_the_damaged_file(
    damage: Damage, family: str, whole: dict[str, Path], tmp_path: Path, marker: Path
) -> None:
    folder = copy_of(whole[family], tmp_path, sealed=True)
    damage.do(folder, marker)
    sentence = refused(lambda: Captioner.load(folder), str(folder), damage.file)
    assert f"is damaged: {damage.file!r}" in sentence or f"lacks {damage.file!r}" in sentence
    assert not marker.exists()


@pytest.mark.parametrize(("damage", "family"), cases(PUBLISHED))
def test_a_published_folder_is_refused_by_what_is_in_it(
    damage: Damage, family: str, whole: dict[str, Path], tmp_path: Path, marker: Path
) -> None:
    folder = copy_of(whole[family], tmp_path, sealed=False)
    damage.do(folder, marker)
    refused(lambda: Captioner.load(folder), str(folder), damage.named or damage.file)
    assert not marker.exists()


# What no hash finds, because whoever changed the folder sealed it again.
SEALED_AGAIN = (
    "a payload as weights",
    "a payload as tokenizer",
    "a payload as configuration",
    "a tensor of another shape",
    "a missing tensor",
    "a tensor that nobody knows",
    "a NaN",
    "integers as weights",
    "weights cut in half",
    "a header of 100 MB",
    "a header 20,000 deep",
    "a model a million million wide",
    "a width of nothing",
    "a configuration 10,000 deep",
    "a configuration that is a list",
    "a tokenizer cut in half",
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SEALED_AGAIN)
def test_a_seal_over_damage_vouches_for_nothing(
    name: str, family: str, whole: dict[str, Path], tmp_path: Path, marker: Path
) -> None:
    folder, damage = copy_of(whole[family], tmp_path, sealed=True), DAMAGES[name]
    damage.do(folder, marker)
    seal_again(folder)
    refused(lambda: Captioner.load(folder), str(folder), damage.named or damage.file)
    assert not marker.exists()


def seal_again(folder: Path, **changes: Any) -> None:
    seal = json.loads((folder / SEAL).read_text()) | changes
    del seal["sha256"]
    for name, entry in seal["files"].items():
        if (folder / name).is_file():
            entry |= {"size": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
    write_json(folder / SEAL, seal | {"sha256": sha256_of_json(seal)})


@pytest.mark.parametrize(
    "do",
    [
        weights(lambda t, _: t.update({PAGE: torch.ones(1)})),
        text_in(INDEX, json.dumps({"weight_map": {"a": PAGE}})),
        config(lambda c: widest(c).update(vocab_size=10**4000)),
    ],
    ids=["tensor", "index", "size"],
)
def test_a_sentence_does_not_quote_a_page(
    do: Callable[[Path, Path], None], whole: dict[str, Path], tmp_path: Path, marker: Path
) -> None:
    folder = copy_of(whole["blip"], tmp_path, sealed=False)
    do(folder, marker)
    if (folder / INDEX).exists():
        (folder / WEIGHTS).unlink()
    refused(lambda: Captioner.load(folder), str(folder))


@pytest.mark.parametrize("setting", ["padding", "truncation"])
def test_padding_and_truncation_that_a_tokenizer_was_saved_with_change_no_prompt(
    setting: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of(whole["blip"], tmp_path, sealed=False)
    expected = Captioner.load(folder, prompt="a picture of two").spec.num_prompt_tokens
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if setting == "padding":
        tokenizer.enable_padding(length=20)
    else:
        tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert Captioner.load(folder, prompt="a picture of two").spec.num_prompt_tokens == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": {"config.json": 7}},
        {"files": {"../config.json": {"size": 1, "sha256": ""}}},
        {"text": {"prompt": 7}},
        {"image": None},
        {"decode": {"max_new_tokens": "many"}},
        {"kind": "pickle"},
        {"format_version": 10**30},
        {"format_version": "1"},
        {"info": 7, "image": {"size": -1}},
    ],
    ids=str,
)
def test_a_seal_that_says_what_no_seal_says_is_refused(
    changes: dict[str, Any], whole: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_of(whole["blip"], tmp_path, sealed=True)
    seal = json.loads((folder / SEAL).read_text()) | changes
    del seal["sha256"]
    write_json(folder / SEAL, seal | {"sha256": sha256_of_json(seal)})
    refused(lambda: Captioner.load(folder), str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_payload_as_seal_is_refused(family: str, whole: dict[str, Path], tmp_path: Path, marker: Path) -> None:
    folder = copy_of(whole[family], tmp_path, sealed=True)
    (folder / SEAL).write_bytes(pickle.dumps(Payload(marker)))
    refused(lambda: Captioner.load(folder), str(folder), SEAL)
    assert not marker.exists()


def test_a_huge_header_is_refused_at_once_and_not_held_in_memory(whole: dict[str, Path], tmp_path: Path) -> None:
    for sealed in (True, False):
        folder = copy_of(whole["blip"], tmp_path / str(sealed), sealed=sealed)
        Captioner.load(folder)  # what that takes is taken by now
        huge_header(folder, folder)
        before_kb, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        refused(lambda folder=folder: Captioner.load(folder), str(folder), WEIGHTS)
        assert time.perf_counter() - begun < 2
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 30_000


# ---- What lies beside a good checkpoint


BESIDE = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "tokenizer.pkl", "vocab.txt")


@pytest.mark.parametrize("family", FAMILIES)
def test_pickles_and_code_beside_good_weights_are_never_opened(
    family: str, whole: dict[str, Path], tmp_path: Path, marker: Path, opened: list[str]
) -> None:
    expected = [result.caption for result in Captioner.load(whole[family]).caption(png_images(3))]
    for sealed in (True, False) if family in PUBLISHED else (True,):
        folder = copy_of(whole[family], tmp_path / str(sealed), sealed=sealed)
        names = [name for name in BESIDE if not sealed or not (folder / name).exists()]
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Payload(marker)))
        for name in ("tokenizer_config.json", "processor_config.json"):
            if not sealed and (folder / name).exists():
                edit_json(folder / name, lambda c: c.update(auto_map={"AutoProcessor": "mine.P", "AutoTokenizer": "x"}))
        code = ("mine.py", "modeling_clip_gpt2.py", "sitecustomize.py", "torch.py")
        for name in code:
            if not sealed or not (folder / name).exists():
                (folder / name).write_text(f"open({str(marker)!r}, 'w')\n")
        opened.clear()
        captioner = Captioner.load(folder)
        read = {Path(name).name for name in opened if name.startswith(str(folder))}
        assert {"config.json", "tokenizer.json", WEIGHTS} <= read
        assert not read & {*names, "mine.py", "torch.py"}
        assert sealed or "modeling_clip_gpt2.py" not in read
        assert [result.caption for result in captioner.caption(png_images(3))] == expected
        assert not marker.exists()


watching: list[str] | None = None


def note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and watching is not None:
        watching.append(str(arguments[0]))


@pytest.fixture
def opened() -> Any:
    """Names of the files that this process opens."""
    global watching
    if not note_opened.__dict__.get("added"):
        sys.addaudithook(note_opened)  # stays for the process; idle but in tests that look
        note_opened.__dict__["added"] = True
    watching = []
    yield watching
    watching = None


# ---- Originals, which are pickled


def bare_pickle(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps({"state_dict": payload}, protocol=2))


def zip_file(path: Path, payload: Payload) -> None:
    torch.save(payload, path)


def old_file(path: Path, payload: Payload) -> None:
    torch.save({"model": payload}, path, _use_new_zipfile_serialization=False)


def good_weights_but_one(path: Path, payload: Payload) -> None:
    state: dict[str, Any] = {f"visual_encoder.blocks.{n}.norm1.weight": torch.ones(8) for n in range(4)}
    torch.save({"model": {**state, "visual_encoder.norm.weight": payload}}, path)


def beside_good_weights(path: Path, payload: Payload) -> None:
    torch.save({"model": {"visual_encoder.norm.weight": torch.ones(8)}, "optimizer": {"lr": [payload]}}, path)


def as_key(path: Path, payload: Payload) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "args": {("x", payload): 1}}, path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors", ""])
@pytest.mark.parametrize(
    "write",
    [bare_pickle, zip_file, old_file, good_weights_but_one, beside_good_weights, as_key],
    ids=lambda f: f.__name__,
)
def test_the_import_job_refuses_a_payload_with_exit_code_2(
    write: Callable[[Path, Payload], None],
    suffix: str,
    tmp_path: Path,
    marker: Path,
    job_module: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / f"original{suffix}"
    write(path, Payload(marker))
    out = tmp_path / "out"
    status = run_import(job_module, weights=path, out=out)
    sentence = capsys.readouterr().err.strip().removeprefix("error: ")
    assert str(path) in sentence or path.name in sentence
    assert "\n" not in sentence
    assert WHAT_TO_DO.search(sentence), sentence
    assert status == {"job": "import_weights", "state": "failed", "exit_code": 2, "error": sentence}
    assert {file.name for file in out.iterdir()} == {"status.json"}
    assert not marker.exists()


def test_the_import_job_does_not_unpack_what_swells(
    tmp_path: Path, job_module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {"visual_encoder.norm.weight": torch.zeros(20_000_000)}}, tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth") as stored, zipfile.ZipFile(tmp_path / "packed.pth", "w", 8) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = run_import(job_module, weights=tmp_path / "packed.pth", out=tmp_path / "out")
    assert f"'{tmp_path}/packed.pth' is compressed to less than 1/10" in status["error"]
    assert WHAT_TO_DO.search(status["error"])
    assert status["exit_code"] == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 30_000


@pytest.mark.parametrize("flag", ["vision_tower", "text_decoder"])
def test_the_import_job_opens_the_pickle_of_a_tower_only_without_safetensors_and_runs_none(
    flag: str, tmp_path: Path, marker: Path, job_module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTImageProcessorPil, ViTModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**size, image_size=32, patch_size=16)).save_pretrained(tmp_path / "vision_tower")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vision_tower")
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_special_tokens([END_OF_TEXT])
    text = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=tokenizer.get_vocab_size())
    GPT2LMHeadModel(text).save_pretrained(tmp_path / "text_decoder")
    save_tokenizer(tokenizer, TEXT, str(tmp_path / "text_decoder"))
    towers = {"vision_tower": tmp_path / "vision_tower", "text_decoder": tmp_path / "text_decoder"}

    damaged = towers[flag]
    torch.save({"a": Payload(marker)}, damaged / "pytorch_model.bin")
    assert run_import(job_module, **towers, out=tmp_path / "beside")["exit_code"] == 0  # never opened
    (damaged / WEIGHTS).unlink()
    capsys.readouterr()
    status = run_import(job_module, **towers, out=tmp_path / "instead")
    sentence = capsys.readouterr().err.strip().removeprefix("error: ")
    assert (status["exit_code"], status["error"]) == (2, sentence)
    assert f"{damaged}/pytorch_model.bin" in sentence
    assert WHAT_TO_DO.search(sentence), sentence
    assert not marker.exists()


def run_import(job_module: ModuleType, **flags: Path) -> dict[str, Any]:
    """Runs jobs/import_weights.py in this process; what its status.json says."""
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    function = "raycap.checkpoint.imports:import_weights"
    with pytest.raises(SystemExit) as ended:
        job_module.run_job("import_weights", {"import_weights": ImportConfig()}, function, words)
    status: dict[str, Any] = json.loads((flags["out"] / "status.json").read_text())
    assert ended.value.code == status["exit_code"]
    return status
