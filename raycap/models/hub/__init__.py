"""CLIP-GPT2 for plain transformers: the files that go into a checkpoint folder, and what its JSON files say of them.

With these a folder loads by AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True), and by
pipeline("image-text-to-text", model=folder, trust_remote_code=True), where raycap is not installed. The modules are flat
and import only transformers, torch and each other. Where raycap.models is imported, before transformers or after it,
trust_remote_code is not needed: registering.py.
"""

from pathlib import Path

MODULES = (
    "configuration_clip_gpt2.py",
    "modeling_clip_gpt2.py",
    "prefix_clip_gpt2.py",
    "processing_clip_gpt2.py",
)
ARCHITECTURE = "ClipGpt2ForConditionalGeneration"  # the one entry of "architectures" in config.json
PROCESSOR = "ClipGpt2Processor"  # "processor_class" in processor_config.json
CONFIG_AUTO_MAP = {  # "auto_map" in config.json
    "AutoConfig": "configuration_clip_gpt2.ClipGpt2Config",
    "AutoModelForImageTextToText": f"modeling_clip_gpt2.{ARCHITECTURE}",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": f"processing_clip_gpt2.{PROCESSOR}"}  # "auto_map" in processor_config.json


def module_texts() -> dict[str, str]:
    """Name -> content of every module that belongs into a folder."""
    return {name: (Path(__file__).parent / name).read_text(encoding="utf-8") for name in MODULES}
