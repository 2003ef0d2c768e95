"""Writes golden/transformers-<version>.json: checkpoints as that version of transformers writes them, and the captions it gives.

A checkpoint is kept as its config.json and the names and shapes of its tensors; the values follow from the names alone
(tensor_of), so that test_golden.py makes the same folder anew. Run it in an environment with the version:

    python3.11 -m venv ENV && echo <site-packages that hold torch> > ENV/lib/python3.11/site-packages/zz_torch.pth
    ENV/bin/pip install transformers==4.51.3 "numpy<2"      # also run: 4.26.1 4.36.2 4.57.6
    ENV/bin/python tests/families/make_golden.py

transformers 4.15.0 (no BLIP yet) asks for a tokenizers without a wheel for Python 3.11: install it with --no-deps beside
huggingface-hub, sacremoses, regex and tokenizers, and this file says what it asks for.
"""

import importlib.metadata
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"
MODELS = ("blip", "blip_untied", "vit_gpt2", "vit_gpt2_untied")
NUM_IMAGES, SIDE, NEW_TOKENS, BEAMS = 8, 32, 10, 3
VOCABULARY = 123  # of the tokenizer; BLIP has [DEC] and [ENC] after it, as it is published
MEAN = STD = 0.5
TIED = {  # second name -> first
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "decoder.lm_head.weight": "decoder.transformer.wte.weight",
}
ALWAYS = {"text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias"}
LEAST_GAP = 1e-4  # between what was chosen and what came second: below it rounding chooses


def tensor_of(name: str, shape: list[int], dtype: str, is_tied: bool) -> np.ndarray:
    """The values of a tensor; zeros for positions and masks, which are no weights."""
    if name.endswith(("position_ids", "masked_bias")) or (name.endswith(".bias") and len(shape) == 4):
        return np.zeros(shape, dtype)
    name = ALWAYS.get(name, TIED.get(name, name) if is_tied else name)
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        values = 0.1 * values + (1 if name.endswith("weight") else 0)  # one-dimensional weights are LayerNorms'
    return (values if len(shape) == 1 else 0.3 * values).astype(dtype)


def images() -> list[np.ndarray]:
    """uint8 (SIDE, SIDE, 3), of a few large fields each."""
    rng = np.random.RandomState(7)
    return [
        rng.randint(0, 256, (4, 4, 3)).astype(np.uint8).repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
        for _ in range(NUM_IMAGES)
    ]


def build(name: str, ties: bool) -> Any:
    """The model, as this version makes it; ties: whether its config.json may say that the words are tied."""
    import transformers

    # Attention is set by name nowhere: every version has its own default.
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": SIDE, "patch_size": 8}
    changes = {} if ties else {"tie_word_embeddings": False}
    if name.startswith("blip"):
        text = {**vision, "vocab_size": VOCABULARY + 2, "encoder_hidden_size": 32, "max_position_embeddings": 64}
        text |= {"bos_token_id": VOCABULARY, "eos_token_id": 2, "sep_token_id": 102, "pad_token_id": 0, **changes}
        config = transformers.BlipConfig(text_config=text, vision_config=vision, **changes)
        return transformers.BlipForConditionalGeneration(config)
    text = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 101}
    text |= {"eos_token_id": 102, "pad_token_id": 0, "is_decoder": True, "add_cross_attention": True, **changes}
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**vision), transformers.GPT2Config(**text)
    )
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 101, 102, 0
    return transformers.VisionEncoderDecoderModel(config=config)


def filled(name: str) -> Any:
    """The model with the values of tensor_of. It is untied by its values where this version allows that, else by its configuration."""
    is_tied = not name.endswith("untied")
    for ties in (True, False):
        model = build(name, ties).eval()
        state = model.state_dict()
        values = {
            key: torch.from_numpy(tensor_of(key, list(tensor.shape), "float32", is_tied))
            for key, tensor in state.items()
            if tensor.is_floating_point() and not key.endswith("masked_bias")
        }
        model.load_state_dict(values, strict=False)
        after = model.state_dict()
        if all(torch.equal(after[key], tensor) for key, tensor in values.items()):
            return model
    raise SystemExit(f"this version cannot hold {name}")


def captions(model: Any, num_beams: int) -> list[list[int]] | None:
    """Token ids; None where this version's BLIP has no beam search (4.26 does not repeat the image's states).

    Stops where two choices are too close to call.
    """
    pixels = torch.from_numpy(np.stack([(image.transpose(2, 0, 1) / 255 - MEAN) / STD for image in images()])).float()
    limits = {"max_length": NEW_TOKENS + 1, "num_beams": num_beams, "do_sample": False}
    try:
        ids = model.generate(pixel_values=pixels, **limits)
    except RuntimeError as error:
        if num_beams == 1 or not hasattr(model, "text_decoder"):
            raise
        print(f"no beam search: {error}")
        return None
    # BLIP's own generate passes on too little: it searches with its text decoder.
    inner = model.text_decoder if hasattr(model, "text_decoder") else model
    told: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": num_beams}
    if inner is model:
        out = model.generate(pixel_values=pixels, **limits, **told)
    else:
        states = model.vision_model(pixels)[0]
        start = torch.full((len(pixels), 1), model.config.text_config.bos_token_id)
        ends = {
            "eos_token_id": model.config.text_config.sep_token_id,
            "pad_token_id": model.config.text_config.pad_token_id,
        }
        masks = {"encoder_attention_mask": torch.ones(states.shape[:-1], dtype=torch.long)}
        out = inner.generate(input_ids=start, encoder_hidden_states=states, **masks, **ends, **limits, **told)
    if num_beams > 1:
        best = out.sequences_scores.reshape(len(pixels), num_beams)
        gaps = best[:, 0] - best[:, 1]
    else:
        gaps = torch.cat([step.topk(2).values.diff().abs().flatten() for step in out.scores])
    assert torch.equal(out.sequences[::num_beams][:, : ids.shape[1]], ids[:, : out.sequences.shape[1]])
    print(f"least gap {gaps.min():.2g}, {len({tuple(row) for row in ids.tolist()})} captions")
    assert gaps.min() > LEAST_GAP
    return ids.tolist()


def checkpoint(model: Any) -> dict[str, Any]:
    """config.json and the names, shapes and dtypes of the tensors of what save_pretrained writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        path = Path(folder) / "model.safetensors"
        if path.exists():
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            path = Path(folder) / "pytorch_model.bin"
            tensors = torch.load(path, weights_only=True)
        names = {name: [str(tensor.dtype)[len("torch.") :], *tensor.shape] for name, tensor in sorted(tensors.items())}
        return {"config": config, "file": path.name, "tensors": names}


def main() -> None:
    real = importlib.metadata.version
    if real("transformers") == "4.15.0":  # what it looks for
        importlib.metadata.version = lambda name: "0.10.3" if name == "tokenizers" else real(name)
    try:
        import transformers
    finally:
        importlib.metadata.version = real
    golden = {}
    for name in MODELS:
        if name.startswith("blip") and not hasattr(transformers, "BlipForConditionalGeneration"):
            continue
        print(name)
        model = filled(name)
        golden[name] = {
            **checkpoint(model),
            "greedy": captions(model, 1),
            "beams": captions(model, BEAMS),
        }
    FOLDER.mkdir(exist_ok=True)
    rows = [f"{json.dumps(name)}: {json.dumps(content, separators=(',', ':'))}" for name, content in golden.items()]
    path = FOLDER / f"transformers-{transformers.__version__}.json"
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
