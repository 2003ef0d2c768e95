"""What every job's command line shares: presets, absolute paths, the printed config, status.json and the exit code."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from raycap.errors import EXIT_FAILURE, EXIT_USER_MISTAKE, RaycapError, StorageError

C = TypeVar("C")
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run_job(name: str, presets: dict[str, Any], function: str, args: list[str] | None = None) -> NoReturn:
    """Parses [PRESET] --flags over the presets' dataclass, calls `function` ("module:name") with it, and exits.

    Exit codes: 0 done, 1 failed, 2 the command cannot work as given, 75 a storage stopped answering half way. They are
    also in <out>/status.json, because `ray job submit` turns every failure into 1.
    """
    config = parse(name, presets, sys.argv[1:] if args is None else args)
    out: str | None = None
    try:
        config = resolve(config)
        out = getattr(config, "out", None)
        _write_status(out, name, "running", None, None)
        print(f"{name} " + json.dumps(asdict(config)), flush=True)
        _load(function)(config)
    except (RaycapError, ValueError) as error:
        code = error.exit_code if isinstance(error, RaycapError) else EXIT_USER_MISTAKE
        _fail(out, name, code, " ".join(str(error).split()))
    except (KeyboardInterrupt, SystemExit):  # Ray Train's handler of SIGINT exits
        _fail(out, name, EXIT_INTERRUPTED, "interrupted; run the same command again to go on")
    except Exception as error:
        last = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()[-1:]  # Ray's hold tracebacks in colours
        _try_write_status(out, name, "failed", EXIT_FAILURE, f"{type(error).__name__}: {''.join(last)}")
        raise
    _write_status(out, name, "succeeded", 0, None)
    _leave(0)


def parse(name: str, presets: dict[str, C], args: list[str]) -> C:
    """The preset named first in args (or the first of presets), with the flags behind it applied. Exits 2 on a wrong flag."""
    preset = next(iter(presets))
    if args and args[0] in presets:
        preset, args = args[0], args[1:]
    defaults = presets[preset]
    title = f"{(type(defaults).__doc__ or '').strip()}"
    if len(presets) > 1:
        title += f"\n\nPresets: {', '.join(presets)}; this help shows the defaults of {preset}. Usage: {name}.py [PRESET] --flags"
    try:
        return tyro.cli(type(defaults), default=defaults, args=args, prog=f"jobs/{name}.py", description=title)
    except ValueError as error:  # from the dataclass: values that do not go together
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_MISTAKE)


def resolve(config: Any) -> Any:
    """The config with absolute paths. Raises UserError for a relative path in a submitted job."""
    from raycap.cluster import resolve_root

    roots = {root: resolve_root(getattr(config, root), f"--{root.replace('_', '-')}") for root in type(config).ROOTS}
    sources = {name: getattr(config, name) for name in getattr(type(config), "SOURCES", ())}
    folders = {name: value for name, value in sources.items() if value and Path(value).expanduser().is_dir()}
    roots |= {name: resolve_root(value, f"--{name.replace('_', '-')}") for name, value in folders.items()}
    return replace(config, **roots)


def _load(function: str) -> Callable[[Any], object]:
    module, _, name = function.partition(":")
    loaded: Callable[[Any], object] = getattr(import_module(module), name)
    return loaded


def _fail(out: str | None, name: str, code: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    _try_write_status(out, name, "failed", code, message)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends the process with Ray shut down first, so that nothing it started outlives it."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
    sys.stdout.flush()
    sys.exit(code)


def _try_write_status(out: str | None, name: str, state: str, code: int, message: str) -> None:
    try:
        _write_status(out, name, state, code, message)
    except RaycapError as error:
        if str(error) != message:
            print(f"error: {error}", file=sys.stderr, flush=True)


def _write_status(out: str | None, name: str, state: str, code: int | None, error: str | None) -> None:
    if not out:
        return
    from raycap import storage

    status = {"job": name, "state": state, "exit_code": code, "error": error}
    content = (json.dumps(status, indent=2) + "\n").encode()
    url = storage.join(out, "status.json")
    try:
        storage.put(url, content)
    except StorageError:
        if code is not None and not storage.is_url(url) and Path(url).is_file():
            with suppress(OSError), open(url, "r+b") as file:  # on a full disk: into the block that it has already
                file.truncate(file.write(content))
                return
        raise
