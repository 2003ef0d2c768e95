"""Fixtures every suite shares: a small demo data set as shards, and the one local Ray of the whole run."""

import importlib.util
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from s3_server import run_s3_server

from raycap import storage
from raycap.config import TrainConfig
from raycap.datasets.coco import read_coco
from raycap.datasets.demo import write_demo
from raycap.schema import Sample
from raycap.shards import pack_shard, read_manifest, read_run, write_manifest
from raycap.text import TextSpec, role_ids, save_tokenizer, train_wordpiece

# Set before anything imports Ray: the test cluster listens on loopback only and must not write a token into the home folder.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ninja")


@dataclass(frozen=True)
class Demo:
    """A small demo data set: roots of the shards of its splits, its COCO folder and its tokenizer's folder."""

    coco: str
    train: str
    val: str
    test: str
    tokenizer: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """96 images to train on, 12 to validate, 16 to test; shards of 40 samples, so that runs and batches cross them."""
    root = tmp_path_factory.mktemp("demo")
    coco = str(root / "coco")
    write_demo(coco, num_train=96, num_val=12, num_test=16, seed=0)
    for split in ("train", "val", "test"):
        read = read_coco(f"{coco}/annotations/captions_{split}.json", f"{coco}/images/{split}")
        pack(str(root / split), [_load(ref.key, ref.url, ref.captions, ref.image_id) for ref in read.samples])
        if split == "train":
            tokenizer = train_wordpiece(caption for ref in read.samples for caption in ref.captions)
            bos_id, eos_id, pad_id = role_ids(tokenizer)
            (root / "tokenizer").mkdir()
            spec = TextSpec(prompt="", bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, max_tokens=512)
            save_tokenizer(tokenizer, spec, str(root / "tokenizer"))
    return Demo(
        coco=coco,
        train=str(root / "train"),
        val=str(root / "val"),
        test=str(root / "test"),
        tokenizer=str(root / "tokenizer"),
    )


def pack(root: str, samples: list[Sample], samples_per_shard: int = 40) -> str:
    """Shards and manifest of the samples, without Ray."""
    indexes = []
    for number, first in enumerate(range(0, len(samples), samples_per_shard)):
        data, index = pack_shard(f"shard-{number:05d}.tar", samples[first : first + samples_per_shard])
        storage.put_new(storage.join(root, index.shard), data)
        indexes.append(index)
    write_manifest(root, indexes)
    return root


def samples_of(root: str) -> list[Sample]:
    """All samples of a folder of shards, in order; none of them may be broken."""
    manifest = read_manifest(root)
    found = [s for number, size in enumerate(manifest.sizes.tolist()) for s in read_run(manifest, number, 0, size)]
    assert all(isinstance(sample, Sample) for sample in found)
    return [sample for sample in found if isinstance(sample, Sample)]


def _load(key: str, url: str, captions: tuple[str, ...], image_id: int | str | None) -> Sample:
    return Sample(
        key=key, image=storage.read_bytes(url), ext=url.rpartition(".")[2], captions=captions, image_id=image_id
    )


@pytest.fixture(scope="session")
def compiler_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compilers that refuse and write down who called them, first on PATH for everything the session starts."""
    folder = tmp_path_factory.mktemp("compilers")
    log = folder / "calls.log"
    log.touch()
    for name in COMPILERS:
        script = folder / name
        script.write_text(f'#!/bin/sh\necho "{name} $@" >> {log}\nexit 1\n')
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(
        folder / "torch_extensions"
    )  # what an earlier run compiled must not hide a call
    return log


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server of the whole session; its environment is that of the Ray workers too."""
    with run_s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def ray_cluster(compiler_log: Path, s3_endpoint: str) -> Iterator[str]:
    """The address of one local Ray with 8 logical CPUs, which this process and the jobs it starts connect to."""
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    tests = Path(__file__).parent  # functions of test modules run in workers
    os.environ["PYTHONPATH"] = os.pathsep.join(
        str(folder) for folder in (tests, tests / "unit", tests / "ray", tests / "s3")
    )
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # "its environment active"
    os.chdir(tests.parent)  # where bare submissions resolve their entry point
    context = ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=True,
        logging_level="ERROR",
        log_to_driver=False,
        dashboard_port=_free_port(),
    )
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    os.environ["RAYCAP_TEST_DASHBOARD"] = f"http://{context.address_info['webui_url']}"
    yield os.environ["RAY_ADDRESS"]
    os.environ.pop("RAY_ADDRESS")
    ray.shutdown()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def job_module() -> ModuleType:
    """jobs/_job.py, whose parser reads every job's flags."""
    spec = importlib.util.spec_from_file_location("_job", Path(__file__).parents[1] / "jobs" / "_job.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(demo: Demo, tmp_path: Path) -> TrainConfig:
    """The small run, not started."""
    from training_runs import small_run

    return small_run(demo, str(tmp_path / "run"))


@pytest.fixture(scope="session")
def undisturbed(demo: Demo, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The small run, run to its end."""
    from training_runs import small_run

    from raycap.training.driver import train_captioner

    config = small_run(demo, str(tmp_path_factory.mktemp("undisturbed") / "run"))
    train_captioner(config)
    return config
