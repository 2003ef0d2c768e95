"""The model card of a checkpoint: README.md, with the call of plain transformers that gives the captions that raycap gives."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from raycap.checkpoint.generation import generate_arguments
from raycap.checkpoint.spec import CheckpointSpec
from raycap.text import prompt_ids

_CLASSES = {  # what loads a folder, and what its images go through; then which versions of transformers the tests ran
    "blip": (
        "BlipForConditionalGeneration",
        "BlipProcessor",
        "transformers 4.26 or newer (tried: 4.26, 4.36, 4.51, 4.57, 5)",
    ),
    "vision-encoder-decoder": (
        "VisionEncoderDecoderModel",
        "AutoImageProcessor",
        "transformers 4.26 or newer (tried: 4.26, 4.36, 4.51, 4.57, 5)",
    ),
    "clip_gpt2": ("AutoModelForImageTextToText", "AutoProcessor", "transformers 5.17 or newer; 4 does not load it"),
}


def model_card(spec: CheckpointSpec, info: Mapping[str, Any]) -> str:
    """Markdown with Hugging Face's metadata. info: of save_checkpoint."""
    metrics = "\n".join(f"| {k} | {v:.4f} |" for k, v in info.get("metrics", {}).items() if isinstance(v, float))
    library = "transformers" if spec.kind in _CLASSES else "raycap"
    source = ", ".join(map(str, info.get("imported_from", ())))
    made = f"imported from {source} with" if source else "trained with"
    step = "" if source else f", step {info.get('step', 'unknown')}"
    size, shorter = spec.image.size, spec.image.shorter_side or spec.image.size
    fit = {
        "squash": f"resized to {size} x {size} pixels",
        "crop": f"resized until their shorter side has {shorter} pixels, of which the middle {size} x {size} are kept",
    }[spec.image.fit]
    return f"""---
library_name: {library}
pipeline_tag: image-text-to-text
tags: [image-captioning, raycap]
---
A {spec.kind} image captioner {made} raycap {version("raycap")}{step}.

Images are {fit}. Prompt: {spec.text.prompt!r}. Captions are searched with {spec.decode}.
{_use(spec) if spec.kind in _CLASSES else ""}
| metric | value |
| --- | --- |
{metrics}
"""


def _use(spec: CheckpointSpec) -> str:
    model, processor, versions = _CLASSES[spec.kind]
    code = ", trust_remote_code=True" if spec.kind == "clip_gpt2" else ""
    settings = [f"{name}={value!r}" for name, value in generate_arguments(spec.decode).items()]
    text, reader, imports, also = "", "processor", f"{model}, {processor}", ""
    if spec.kind == "vision-encoder-decoder":
        imports, reader = f"{processor}, AutoTokenizer, {model}", "AutoTokenizer.from_pretrained(folder)"
        if spec.text.prompt:  # with the first token, as raycap has it
            also = "import torch\n"
            settings.append(f"decoder_input_ids=torch.tensor([{prompt_ids(spec.tokenizer, spec.text)}])")
    elif spec.text.prompt:
        text = f"text=[{spec.text.prompt!r}], "
    missing = ("banned_words", "required_words", "length_counts_prompt")
    words = ", ".join(name for name in missing if getattr(spec.decode, name))
    limits = "".join(
        [
            "\nIts processor loads in transformers 5 alone; raycap runs no code of a folder." if code else "",
            "\nplain transformers ignores generation_config.json of a BLIP: name the settings."
            if spec.kind == "blip"
            else "",
            "\nraycap's draws are others." if spec.decode.do_sample else "",
            f"\ntransformers has no {words}." if words else "",
        ]
    )
    return f"""
With {versions}:

```python
{also}from PIL import Image
from transformers import {imports}

folder = "."
model = {model}.from_pretrained(folder{code})
processor = {processor}.from_pretrained(folder{code})
inputs = processor([Image.open("photo.jpg").convert("RGB")], {text}return_tensors="pt")
ids = model.generate(**inputs, {", ".join(settings)})
print({reader}.batch_decode(ids, skip_special_tokens=True)[0])
```
{limits}
"""
