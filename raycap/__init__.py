"""raycap: distributed training, evaluation and batch inference of image captioning models on Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raycap.captioner import Captioner
    from raycap.schema import DecodeSettings
    from raycap.scorer import Scorer

__all__ = ["Captioner", "DecodeSettings", "Scorer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`from raycap import Captioner` loads torch on first use, so that `import raycap` stays instant (PEP 562)."""
    if name == "Captioner":
        from raycap.captioner import Captioner

        return Captioner
    if name == "DecodeSettings":
        from raycap.schema import DecodeSettings

        return DecodeSettings
    if name == "Scorer":
        from raycap.scorer import Scorer

        return Scorer
    raise AttributeError(f"module 'raycap' has no attribute {name!r}")
