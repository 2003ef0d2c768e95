"""Tells transformers' auto classes of CLIP-GPT2, so that its folders load without trust_remote_code. Owns none of its code.

`import raycap.models` must not wait for transformers, nor another model for the code of this one, and while transformers
imports its own modules ours cannot be. So the auto classes, once they are there, are told of classes that stand for ours
until the first folder is loaded.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from raycap.models.hub import PROCESSOR


class StandingConfig:
    """Stands for ClipGpt2Config."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _register_ours()[0](*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        return _register_ours()[0].from_dict(*args, **kwargs)


class StandingProcessor:
    """Stands for ClipGpt2Processor; found by its name."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return _register_ours()[1].from_pretrained(*args, **kwargs)


StandingProcessor.__name__ = PROCESSOR
REGISTER: dict[str, Callable[[Any], object]] = {  # module of transformers -> what is done with it
    "transformers.models.auto.configuration_auto": lambda module: module.AutoConfig.register(
        "clip_gpt2", StandingConfig, exist_ok=True
    ),
    "transformers.models.auto.processing_auto": lambda module: module.AutoProcessor.register(
        StandingConfig, StandingProcessor, exist_ok=True
    ),
}


def watch_imports() -> None:
    """Registers with the auto classes that are loaded, and with the others once they are."""
    for name, register in REGISTER.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """A finder of sys.meta_path that finds what the path holds, and registers behind the import of an auto class."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in REGISTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            REGISTER[name](module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register_ours() -> tuple[Any, Any]:
    """Configuration and processor, which every auto class knows from now on."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from raycap.models.hub.configuration_clip_gpt2 import ClipGpt2Config
    from raycap.models.hub.modeling_clip_gpt2 import ClipGpt2ForConditionalGeneration
    from raycap.models.hub.processing_clip_gpt2 import ClipGpt2Processor

    AutoConfig.register(ClipGpt2Config.model_type, ClipGpt2Config, exist_ok=True)
    AutoModelForImageTextToText.register(ClipGpt2Config, ClipGpt2ForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(ClipGpt2Config, ClipGpt2Processor, exist_ok=True)  # type: ignore[no-untyped-call]  # theirs
    return ClipGpt2Config, ClipGpt2Processor
