"""raycap/units.py: every unit exists once, a run that starts again sees what is there, another run is refused."""

from pathlib import Path

import pytest

from raycap import storage, units
from raycap.errors import EXIT_USER_MISTAKE, StorageError


def test_committing_the_same_bytes_again_is_fine_and_other_bytes_are_refused(tmp_path: Path) -> None:
    url = f"{tmp_path}/shard-00000.tar"
    assert units.commit(url, b"one")
    assert not units.commit(url, b"one")
    with pytest.raises(
        StorageError, match=r"^cannot commit unit 'shard-00000.tar': .*3 bytes, .*choose another --out$"
    ):
        units.commit(url, b"two")
    assert storage.read_bytes(url) == b"one"


def test_the_first_of_two_units_that_may_differ_stays(tmp_path: Path) -> None:
    url = f"{tmp_path}/unit-00000000.parquet"
    assert units.commit_first(url, b"score -0.1")
    assert not units.commit_first(url, b"score -0.1000001")
    assert storage.read_bytes(url) == b"score -0.1"


def test_done_lists_finished_units_only(tmp_path: Path) -> None:
    assert units.done(f"{tmp_path}/out", ".json") == set()
    units.commit(f"{tmp_path}/out/u0.json", b"")
    units.commit(f"{tmp_path}/out/sub/u1.json", b"")
    units.commit(f"{tmp_path}/out/u2.tar", b"")
    storage.put(f"{tmp_path}/out/.tmp-u3.json-12", b"")
    assert units.done(f"{tmp_path}/out", ".json") == {"u0", "sub/u1"}


def test_a_seal_is_written_once(tmp_path: Path) -> None:
    units.seal(str(tmp_path), "_done", b"10 units")
    units.seal(str(tmp_path), "_done", b"10 units")
    with pytest.raises(StorageError, match="holds another run's '_done'"):
        units.seal(str(tmp_path), "_done", b"11 units")


def test_a_plan_is_accepted_again_and_another_one_is_refused_with_what_differs(tmp_path: Path) -> None:
    url = f"{tmp_path}/plan.json"
    units.claim(url, {"seed": 0, "rows": 7, "root": "/a"})
    units.claim(url, {"root": "/a", "rows": 7, "seed": 0})
    with pytest.raises(StorageError) as caught:
        units.claim(url, {"seed": 1, "rows": 7, "root": "/a", "new": None, "size": 3})
    assert "was begun with seed=0, size=None and this command has seed=1, size=3; repeat" in str(caught.value)
    assert caught.value.exit_code == EXIT_USER_MISTAKE


@pytest.mark.parametrize("found", [b"", b"[1]", b"\xff", b"3"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, found: bytes) -> None:
    storage.put(f"{tmp_path}/plan.json", found)
    with pytest.raises(StorageError, match="is not the plan of an output of raycap"):
        units.claim(f"{tmp_path}/plan.json", {"seed": 0})
