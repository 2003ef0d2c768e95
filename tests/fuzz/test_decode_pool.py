"""raycap/decode_pool.py: the pixels and errors of prepare_bytes, whatever a file does to its decoder."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from nasty import Nasty, encode, nasty_files, photo, scan_bomb
from PIL import Image

from raycap.decode_pool import DecodePool
from raycap.errors import ImageError, RaycapError
from raycap.image import MAX_PIXELS, Prepared, prepare_bytes
from raycap.schema import ImageSpec

T = TypeVar("T")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest undoes the filter that raycap.image sets

SPEC = ImageSpec(size=16)
UNIT = Path(__file__).parents[1] / "unit"  # where nasty.py is


def outcome(result: Prepared | ImageError) -> object:
    """What of a result can be compared."""
    if isinstance(result, ImageError):
        return result.kind, str(result)
    return result.pixels.shape, result.pixels.tobytes(), result.width, result.height


def in_process(data: bytes, spec: ImageSpec) -> object:
    try:
        return outcome(prepare_bytes(data, spec))
    except ImageError as error:
        return outcome(error)


def kinds(results: list[Prepared | ImageError]) -> list[str]:
    return [result.kind if isinstance(result, ImageError) else "ok" for result in results]


def children() -> list[psutil.Process]:
    """The decoder processes of this one that live."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "raycap.decode_child" in child.cmdline()
    ]


def wait_for(look: Callable[[], T], timeout_s: float = 30) -> T:
    """What look returns when it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"still {found!r} after {timeout_s} s"
        time.sleep(0.01)
    return found


def at_work() -> list[psutil.Process]:
    """Children that have decoded for 0.3 s of CPU or more beyond their start, which takes about as long."""
    return [child for child in children() if sum(child.cpu_times()[:2]) > 0.8]


def python(code: str, timeout_s: float = 60) -> str:
    """Standard output of code run as `python -c`, so without a __main__ file."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(UNIT)], capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the same as in process


def test_every_nasty_file_has_the_same_outcome_in_a_child_as_in_process() -> None:
    files = nasty_files()
    assert len(files) >= 60
    assert len({file.name for file in files}) == len(files)
    with DecodePool(2) as pool:
        results = pool.prepare_all([file.data for file in files], SPEC)
        assert len(children()) == 2
        peaks = [_peak_bytes(child) for child in children()]

    def expected(file: Nasty) -> str:
        return file.kind or "ok"

    assert {f.name: k for f, k in zip(files, kinds(results), strict=True)} == {f.name: expected(f) for f in files}
    for file, result in zip(files, results, strict=True):
        assert outcome(result) == in_process(file.data, SPEC), file.name
    assert max(peaks) < 2**28  # no bomb went off: the largest legal file of these needs far less


def _peak_bytes(child: psutil.Process) -> int:
    (line,) = [x for x in Path(f"/proc/{child.pid}/status").read_text().splitlines() if x.startswith("VmPeak:")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("size", [1, 64, 384, 1000])
def test_a_child_prepares_the_same_pixels_as_this_process(size: int) -> None:
    spec = ImageSpec(size=size)
    images = [encode(photo(90, 41, seed), name) for seed, name in enumerate(("JPEG", "PNG", "WEBP", "AVIF"))]
    with DecodePool() as pool:
        for data, result in zip(images, pool.prepare_all(images, spec), strict=True):
            assert outcome(result) == in_process(data, spec)
            assert isinstance(result, Prepared)
            assert (result.width, result.height) == (90, 41)


def test_a_child_decodes_fast_where_the_spec_says_so() -> None:
    data = encode(photo(900, 700), "JPEG", quality=90)
    fast, exact = ImageSpec(size=96, decode="fast"), ImageSpec(size=96)
    with DecodePool(1) as pool:
        as_fast, as_exact = pool.prepare(data, fast), pool.prepare(data, exact)
    assert outcome(as_fast) == in_process(data, fast)
    assert outcome(as_exact) == in_process(data, exact)
    assert (as_fast.pixels != as_exact.pixels).any()


def test_a_child_resizes_and_crops_as_the_spec_says() -> None:
    data = encode(photo(90, 41), "PNG")
    whole, wider = ImageSpec(size=20, fit="crop"), ImageSpec(size=20, fit="crop", shorter_side=30, resample="bilinear")
    with DecodePool(1) as pool:
        results = [outcome(pool.prepare(data, spec)) for spec in (whole, wider)]
    assert results == [in_process(data, spec) for spec in (whole, wider)]
    assert results[0] != results[1]


def test_results_are_in_order_whoever_calls_at_the_same_time() -> None:
    images = [encode(photo(20 + n, 30, n)) if n % 5 else b"no image" for n in range(60)]
    expected = [in_process(data, SPEC) for data in images]
    with DecodePool(2) as pool:
        found: dict[int, list[object]] = {}

        def call(n: int) -> None:
            if n % 2:
                found[n] = [outcome(result) for result in pool.prepare_all(images, SPEC)]
            else:
                found[n] = []
                for data in images:
                    try:
                        found[n].append(outcome(pool.prepare(data, SPEC)))
                    except ImageError as error:
                        found[n].append(outcome(error))

        threads = [threading.Thread(target=call, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == dict.fromkeys(range(6), expected)
        assert pool.prepare_all([], SPEC) == []


def test_a_limit_on_bytes_holds_before_anything_is_sent() -> None:
    data = encode(photo())
    with DecodePool(max_bytes=len(data)) as pool:
        longer = data + b"x"
        assert kinds(pool.prepare_all([longer, b"", data], SPEC)) == ["too_many_bytes", "empty", "ok"]
        with pytest.raises(ImageError, match=f"the image holds {len(longer)} bytes, more than {len(data)}"):
            pool.prepare(longer, SPEC)


@pytest.mark.parametrize(
    "options", [{"num_workers": 0}, {"timeout_s": 0.0}, {"timeout_s": float("nan")}, {"max_bytes": 2**40}]
)
def test_limits_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a decode pool needs"):
        DecodePool(**options)  # type: ignore[arg-type]


# ---- what only a child can survive


def test_an_image_that_kills_its_decoder_is_blamed_and_no_other() -> None:
    good = [encode(photo(seed=seed)) for seed in range(4)]
    with DecodePool(timeout_s=300) as pool:
        results: list[list[Prepared | ImageError]] = []
        images = [*good[:2], scan_bomb(), *good[2:]]
        caller = threading.Thread(target=lambda: results.append(pool.prepare_all(images, SPEC)))
        caller.start()
        (child,) = wait_for(at_work)
        child.send_signal(signal.SIGSEGV)
        caller.join(60)
        assert kinds(results[0]) == ["ok", "ok", "decoder_crash", "ok", "ok"]
        assert "died of SIGSEGV" in str(results[0][2])
        (after,) = children()
        assert after.pid != child.pid


def test_a_child_that_dies_between_two_images_costs_neither() -> None:
    data = encode(photo())
    with DecodePool() as pool:
        for _ in range(10):
            pool.prepare(data, SPEC)
            (child,) = children()
            child.kill()  # at once: sometimes the next image is sent to it before it is gone
            assert outcome(pool.prepare(data, SPEC)) == in_process(data, SPEC)


def test_a_child_that_dies_before_it_reads_an_image_costs_it_nothing() -> None:
    data = encode(photo(1000, 800), compress_level=0)  # 2.4 MB, more than a pipe holds
    with DecodePool() as pool:
        pool.prepare(data, SPEC)
        (child,) = children()
        child.suspend()
        results: list[Prepared | ImageError] = []
        caller = threading.Thread(target=lambda: results.extend(pool.prepare_all([data], SPEC)))
        caller.start()
        time.sleep(0.3)  # the pipe is full now
        child.kill()
        caller.join(60)
        assert [outcome(result) for result in results] == [in_process(data, SPEC)]


def test_an_image_that_takes_too_long_is_ended_and_no_other() -> None:
    good = encode(photo())
    with DecodePool(timeout_s=2) as pool:
        begun = time.monotonic()
        assert kinds(pool.prepare_all([good, scan_bomb(), good], SPEC)) == ["ok", "decoder_timeout", "ok"]
        assert time.monotonic() - begun < 30
        with pytest.raises(ImageError, match="the image was not decoded within 2 s"):
            pool.prepare(scan_bomb(), SPEC)
        wait_for(lambda: not children())  # the one that hung is gone


def test_an_image_that_takes_too_much_memory_is_refused_and_no_other() -> None:
    """40 million pixels take 160 MB, and a child has 180 MB of which it needs 120 for itself."""
    good, large = encode(photo()), encode(Image.new("RGB", (8000, 5000)), compress_level=1)
    with DecodePool(memory_bytes=180 * 2**20) as pool:
        assert kinds(pool.prepare_all([good, large, good], SPEC)) == ["ok", "decoder_memory", "ok"]
        with pytest.raises(ImageError, match="cannot be decoded within the 188743680 bytes"):
            pool.prepare(large, SPEC)
    with DecodePool(memory_bytes=150 * 2**20) as pool:  # not even its bytes have room
        assert kinds(pool.prepare_all([good + bytes(60 * 2**20), good], SPEC)) == ["decoder_memory", "ok"]


def test_the_memory_of_a_child_holds_the_largest_images() -> None:
    """50 million pixels, of those that take most: with alpha and on their side, and as WebP."""
    exif = Image.Exif()
    exif[0x0112] = 6
    large = Image.new("L", (10_000, 5000), 90)
    images = [
        encode(Image.merge("LA", (large, large)), exif=exif, compress_level=1),
        encode(large.convert("RGB"), "WEBP", lossless=True, quality=0, method=0),
    ]
    with DecodePool(timeout_s=60) as pool:
        for result in pool.prepare_all(images, SPEC):
            assert isinstance(result, Prepared), result
            assert result.width * result.height == MAX_PIXELS
        assert 2**28 < max(_peak_bytes(child) for child in children()) < 2**30


@pytest.mark.parametrize("memory_bytes", [2**20, 60 * 2**20])
def test_children_that_die_at_their_start_are_an_error_and_no_loop(memory_bytes: int) -> None:
    with DecodePool(2, memory_bytes=memory_bytes) as pool:
        for _ in range(2):
            with pytest.raises(RaycapError, match=f"at its start with memory_bytes={memory_bytes}") as caught:
                pool.prepare_all([encode(photo())] * 5, SPEC)
            assert not isinstance(caught.value, ImageError)
        wait_for(lambda: not children(), timeout_s=10)  # the other worker gives up as well


# ---- the life of a child


def test_a_child_outlives_the_thread_that_needed_it_first() -> None:
    """The kernel's death signal is sent when the thread ends that started the process, not the process it is of."""
    data = encode(photo())
    with DecodePool() as pool:
        thread = threading.Thread(target=pool.prepare, args=(data, SPEC))
        thread.start()
        thread.join()
        (first,) = children()
        pool.prepare(data, SPEC)
        assert [child.pid for child in children()] == [first.pid]


@pytest.mark.parametrize("num_images", [2, 5])
def test_closing_ends_every_child_and_every_call(num_images: int) -> None:
    """An image whose child was ended by close() is not blamed for it; images that wait are not waited for."""
    pool = DecodePool(2, timeout_s=300)
    errors: list[Exception] = []

    def call() -> None:
        try:
            pool.prepare_all([scan_bomb()] * num_images, SPEC)
        except Exception as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    wait_for(lambda: len(at_work()) == 2)
    pool.close()
    assert not children()
    caller.join(30)
    assert [type(error) for error in errors] == [RaycapError]
    with pytest.raises(RaycapError, match="the decode pool is closed"):
        pool.prepare(encode(photo()), SPEC)
    pool.close()


def test_no_child_is_left_when_its_parent_is_killed() -> None:
    """One child idle, which reads the end of its input, and one at work for minutes, which the kernel ends."""
    code = """
        import sys, threading
        sys.path.insert(0, sys.argv[1])
        from nasty import encode, photo, scan_bomb
        from raycap.decode_pool import DecodePool
        from raycap.schema import ImageSpec
        idle, busy = DecodePool(), DecodePool(timeout_s=300)
        idle.prepare(encode(photo()), ImageSpec(size=8))
        threading.Thread(target=busy.prepare, args=(scan_bomb(), ImageSpec(size=8))).start()
        print("begun", flush=True)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(UNIT)], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"begun\n"
        here = psutil.Process(parent.pid)
        decoders = wait_for(lambda: two if len(two := here.children()) == 2 else [])
        wait_for(lambda: any(sum(child.cpu_times()[:2]) > 0.8 for child in decoders))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    gone, alive = psutil.wait_procs(decoders, timeout=10)
    assert (len(gone), alive) == (2, [])


def test_a_forked_process_has_children_of_its_own() -> None:
    code = """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        import psutil
        from nasty import encode, photo
        from raycap.decode_pool import DecodePool
        from raycap.schema import ImageSpec
        data, spec = encode(photo()), ImageSpec(size=8)
        pool = DecodePool()
        expected = pool.prepare(data, spec).pixels.tolist()
        (first,) = psutil.Process().children()
        if not (pid := os.fork()):
            same = pool.prepare(data, spec).pixels.tolist() == expected
            own = [child.pid for child in psutil.Process().children()]
            pool.close()
            print("forked", same, len(own), first.pid in own, len(psutil.Process().children()), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        print("parent", pool.prepare(data, spec).pixels.tolist() == expected, first.is_running())
        pool.close()
        print(psutil.Process().children())
    """
    assert python(code).splitlines() == ["forked True 1 False 0", "parent True True", "[]"]


def test_a_child_knows_no_secret_and_holds_no_file_of_its_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with open(tmp_path / "open", "w") as file, DecodePool(timeout_s=7) as pool:
        os.set_inheritable(file.fileno(), True)
        pool.prepare(encode(photo()), SPEC)
        (child,) = children()
        assert set(child.environ()) <= {"PYTHONPATH", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "LD_LIBRARY_PATH"}
        held = {fd.name: str(fd.readlink()) for fd in Path(f"/proc/{child.pid}/fd").iterdir()}
        pipes = {name for name, target in held.items() if target.startswith("pipe:")}
        assert len(pipes) == 2  # its input and its output
        assert {held[name] for name in held.keys() - pipes} == {held["2"]}  # its messages, a file of its own
        assert held["2"] != str(tmp_path / "open")
        assert child.num_threads() == 1
        assert child.rlimit(psutil.RLIMIT_AS) == (2**30, 2**30)
        assert child.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert child.rlimit(psutil.RLIMIT_FSIZE)[0] <= 2**16
        assert 7 <= child.rlimit(psutil.RLIMIT_CPU)[0] <= 30
        maps = Path(f"/proc/{child.pid}/maps").read_text()
        assert "numpy" in maps
        assert not {name for name in ("torch", "/ray/", "transformers", "pyarrow") if name in maps}


def test_a_child_loads_what_decodes_and_nothing_else() -> None:
    code = """
        import sys
        before = set(sys.modules)
        import raycap.decode_child, raycap.image
        from nasty import nasty_files
        for file in nasty_files():
            try:
                raycap.image.decode_image(file.data)
            except raycap.image.ImageError:
                pass
        names = {n.partition(".")[0] for n in set(sys.modules) - before if not n.startswith("_")} - sys.stdlib_module_names
        print(*sorted(names))
    """
    code = "import sys; sys.path.insert(0, sys.argv[1])\n" + textwrap.dedent(code)
    assert set(python(code).split()) - {"cython_runtime", "defusedxml"} == {
        *("PIL", "numpy", "simplejpeg", "cykooz_resizer"),
        *("raycap", "nasty"),
    }
