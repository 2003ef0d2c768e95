"""The readers of data sets on S3: images that a bucket lost counted, a server that is gone fatal."""

import json
import zlib
from collections.abc import Iterator

import pytest
from s3_server import BUCKET, free_port, run_s3_server

from raycap import storage
from raycap.data.pack import Packed, pack_unit
from raycap.data.spill import Unit
from raycap.datasets.read import read_dataset
from raycap.errors import StorageError
from raycap.schema import SampleRef

pytestmark = pytest.mark.s3
ROOT = f"s3://{BUCKET}"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with run_s3_server() as endpoint:
        yield endpoint


def test_every_format_is_read_from_a_bucket(endpoint: str) -> None:
    url = "http://example.org/a.jpg"
    name = f"0_{zlib.crc32(url.encode())}.jpg"
    storage.put(f"{ROOT}/images/{name}", b"x")
    contents = {
        "coco": json.dumps(
            {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a"}]}
        ),
        "karpathy": json.dumps({"images": [{"filename": name, "split": "val", "sentences": [{"raw": "a"}]}]}),
        "lavis": json.dumps([{"image": name, "caption": "a"}]),
        "flickr8k": f"{name}#0\ta",
        "flickr30k": f"image_name| comment_number| comment\n{name}| 0| a",
        "conceptual": f"a\t{url}\nb\t{url}\n",
    }
    for format, content in contents.items():
        annotations = f"{ROOT}/annotations-{format}"
        storage.put(annotations, content.encode())
        split = "val" if format == "karpathy" else ""
        read = read_dataset(annotations, f"{ROOT}/images", split=split)
        (sample,) = read.samples
        assert (sample.url, sample.captions) == (f"{ROOT}/images/{name}", ("a",))
        assert read.skipped == ({"image file is missing": 1} if format == "conceptual" else {})


def test_an_object_that_is_gone_is_left_out_and_a_server_that_is_gone_ends_the_shard(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put(f"{ROOT}/pack/a.jpg", b"bytes")
    refs = tuple(SampleRef(key=key, url=f"{ROOT}/pack/{key}.jpg", captions=("c",)) for key in ("a", "gone"))
    packed = pack_unit(f"{ROOT}/out", Unit("shard-00000", refs, frozenset()))
    assert packed == Packed(1, (("gone", "unreadable"),))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StorageError, match="nothing answers at"):
        pack_unit(f"{ROOT}/out", Unit("shard-00001", refs, frozenset()))
