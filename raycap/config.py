"""What a user sets: one frozen dataclass per job, its presets as constants. Standard library only, so that --help is instant.

A field's docstring is its help text. `ROOTS` names the fields that hold a path or URL; the command line makes them absolute.
Sizes that follow from others (accumulation, steps, micro steps) are derived where they are used, never asked.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "fp32", "bf16"]
Architecture = Literal[
    "blip_tiny",
    "blip_base_384",
    "blip_large_384",
    "clip_gpt2_tiny",
    "clip_gpt2_mlp",
    "clip_gpt2_transformer",
    "vit_gpt2_tiny",
    "vit_gpt2",
    "vgg_lstm_tiny",
    "vgg_lstm",
]  # raycap/models/presets.py has them
DatasetFormat = Literal["auto", "coco", "karpathy", "lavis", "flickr8k", "flickr30k", "conceptual", "img2dataset"]


def compute_dtype(dtype: Dtype, on_gpu: bool) -> Literal["fp32", "bf16"]:
    """What matrix products run in; auto is bf16 on a GPU and fp32 on a CPU. Weights are fp32 either way."""
    if dtype != "auto":
        return dtype
    return "bf16" if on_gpu else "fp32"


def default_root(name: str) -> str:
    """`$RAYCAP_RUNS/<name>`, or `~/raycap-runs/<name>`."""
    return str(Path(os.environ.get("RAYCAP_RUNS") or Path.home() / "raycap-runs") / name)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_at_least(lowest: Literal[0, 1], config: object, *names: str) -> None:
    """Raises ValueError naming the first of these fields that is below `lowest`."""
    said = "must be at least 1" if lowest else "must not be negative"
    for name in names:
        value = getattr(config, name)
        _require(value >= lowest, f"--{name.replace('_', '-')} {said}, got {value}")


def _require_gpus(num_gpus: float) -> None:
    _require(num_gpus > 0, f"--num-gpus must be positive, got {num_gpus}; --device cpu uses none")
    _require(
        num_gpus < 1 or num_gpus == int(num_gpus),
        f"--num-gpus must be whole or below 1, got {num_gpus}; Ray shares a GPU or gives whole ones",
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole demo on one machine: data set, shards, training, evaluation."""

    ROOTS: ClassVar = ("out",)

    out: str = default_root("demo")
    """Folder everything is written below."""
    num_train: int = 4000
    """Images to train on."""
    num_val: int = 200
    """Images for validation loss and CIDEr while training; their pairs of objects are not in the training images."""
    num_test: int = 400
    """Images of the final evaluation; their pairs of objects are in neither of the other splits."""
    epochs: int = 0
    """Passes over the training images; 0 takes the preset's."""
    seed: int = 0
    """Seed of the scenes."""

    def __post_init__(self) -> None:
        _require(
            min(self.num_train, self.num_val, self.num_test) >= 2,
            f"--num-train, --num-val and --num-test must be at least 2, got {self.num_train}, {self.num_val}, {self.num_test}",
        )
        _require(self.epochs >= 0, f"--epochs must not be negative, got {self.epochs}")


@dataclass(frozen=True, kw_only=True)
class FamiliesConfig(DemoConfig):
    """The four model families, trained equally long on the demo's images -> report.html with a table of their scores."""

    out: str = default_root("families")
    """Folder everything is written below: one run folder for each family, report.html, comparison.json."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Captions and images of a known data set -> WebDataset shards and manifest.parquet. Without flags: the demo data set."""

    ROOTS: ClassVar = ("annotations", "images", "out")

    annotations: str = ""
    """File or s3:// URL of the captions, for example /data/coco/annotations/captions_train2017.json."""
    images: str = ""
    """Folder or s3:// root that the annotations' file names are below; or that img2dataset wrote its shards to."""
    format: DatasetFormat = "auto"
    """What the annotations are; auto looks into the file. lavis: BLIP's json lists; conceptual: CC3M's and CC12M's TSV;
    img2dataset: shards, without --annotations, packed again in their order."""
    split: str = ""
    """Karpathy's dataset_*.json: train (with restval), val or test. Flickr8k: the same, or a file of image names."""
    out: str = default_root("demo")
    """Folder or s3:// root for the shards. The same command again resumes; other data in it is refused."""
    samples_per_shard: int = 1000
    """Images in one tar; one task holds this many encoded images in memory."""
    seed: int = 0
    """Seed of the order in which images are packed, so that neighbours in a shard are strangers."""
    max_side: int = 0
    """Resize images whose longer side has more pixels to it, as JPEG; others keep their bytes. 0 decodes and resizes none."""
    quality: int = 95
    """JPEG quality of the images that --max-side resizes."""
    max_error_rate: float = 0.05
    """Share of the samples that may be left out (unreadable, bad names, repeated keys); report.json lists them by key."""

    def __post_init__(self) -> None:
        if self.format == "img2dataset":
            _require(
                bool(self.images) and not self.annotations,
                "--format img2dataset takes --images, the folder that img2dataset wrote, and no --annotations",
            )
            _require(
                self.seed == 0, f"--seed {self.seed} has no meaning with --format img2dataset, which keeps the order"
            )
        else:
            _require(
                bool(self.annotations) == bool(self.images),
                "--annotations and --images go together; give both, --images alone with --format img2dataset, or neither for the "
                "demo",
            )
        _require(
            not self.images or self.out != default_root("demo"),
            "--images needs an --out of its own",
        )
        _require(self.samples_per_shard >= 1, f"--samples-per-shard must be at least 1, got {self.samples_per_shard}")
        _require(
            self.max_side == 0 or self.max_side >= 32,
            f"--max-side must be 0 or at least 32 pixels, got {self.max_side}",
        )
        _require(1 <= self.quality <= 95, f"--quality must be in [1, 95], got {self.quality}")
        _require(
            self.max_side > 0 or self.quality == PrepareConfig.quality,
            "--quality is for images that are resized; give --max-side too",
        )
        _require(0 <= self.max_error_rate < 1, f"--max-error-rate must be in [0, 1), got {self.max_error_rate}")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Weights of others -> a checkpoint folder: BLIP's, ClipCap's or VGG16's original file, or towers to put together."""

    ROOTS: ClassVar = ("out",)
    SOURCES: ClassVar = ("weights", "vision_tower", "text_decoder", "tokenizer")

    weights: str = ""
    """salesforce/BLIP's .pth, ClipCap's .pt, torchvision's vgg16 .pth, or a folder or hub name with a pytorch_model.bin. Pickled:
    give only files you trust."""
    vision_tower: str = ""
    """Folder or hub name of CLIP, ViT, SigLIP or DINOv2, for ClipCap's weights or to put together with --text-decoder."""
    text_decoder: str = ""
    """Folder or hub name of a GPT-2, to put together with --vision-tower."""
    architecture: Literal["clip_gpt2_mlp", "clip_gpt2_transformer", "vit_gpt2"] = "clip_gpt2_mlp"
    """How a --vision-tower and a --text-decoder are put together."""
    tokenizer: str = ""
    """Folder or hub name of the tokenizer the weights were trained with; a --text-decoder brings its own."""
    prompt: str = ""
    """Text in front of every caption, such as BLIP's "a picture of "."""
    image_size: int = 0
    """Side of the images in pixels; 0 keeps that of the weights, whose position embeddings are interpolated otherwise."""
    settings: str = ""
    """JSON object of settings in place of the architecture's: {"mapper": "linear_tanh", "freeze_text": 6, "normalize_prefix": true}."""
    num_heads: int = 0
    """Heads of ClipCap's GPT-2, which leave no trace in its weights; 0 takes one for each 64 of its width."""
    seed: int = 0
    """Seed of what is drawn anew."""
    out: str = default_root("imported")
    """Folder or s3:// root of the checkpoint; it must be empty, or not there yet."""

    def __post_init__(self) -> None:
        _require(
            not (self.weights and self.text_decoder),
            "--text-decoder is put together with a --vision-tower; --weights bring their own",
        )
        _require_at_least(0, self, "image_size", "num_heads", "seed")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tune or train a captioner on shards. The same command again resumes the run in --out."""

    ROOTS: ClassVar = ("out", "train_shards", "val_shards")
    SOURCES: ClassVar = ("init_from", "tokenizer")  # a folder, or else a hub name

    # Data
    train_shards: str = ""
    """Folder or s3:// root: shards as jobs/prepare_shards.py writes them, or img2dataset's output as it is. Empty: the demo's."""
    val_shards: str = ""
    """The same for validation."""
    run_length: int = 32
    """Neighbours of a shard that are read together, at most 128; fewer mix batches better and read shorter pieces."""
    max_error_rate: float = 0.05
    """Share of an epoch's samples that may be bad; they are skipped and listed in train.json. More ends the run."""
    out: str = default_root("demo")
    """Output root: checkpoint/ (best by CIDEr), checkpoints/ (the last ones), metrics.jsonl, config.json, status.json."""

    # Model
    init_from: str = ""
    """Start weights: a local folder or a hub name in Hugging Face's layout. Empty: from scratch."""
    architecture: Architecture = "blip_tiny"
    """What to start from scratch, see raycap/models/presets.py; the tiny ones have 1 to 2 million parameters."""
    tokenizer: str = ""
    """Folder or hub name of the tokenizer when starting from scratch. Demo preset: trained on the demo's captions."""
    image_size: int = 64
    """Side of the square that images are resized to, in pixels; a multiple of the patch size."""
    prompt: str = ""
    """Text in front of every caption, in training (masked from the loss) and in generation."""
    max_tokens: int = 32
    """Longest caption in tokens, prompt and end included; longer ones are cut."""
    clean_captions: Literal["auto", "on", "off"] = "auto"
    """Lower case, no punctuation, at most 30 words, as BLIP's captions are. auto: as --init-from has it; on from scratch."""
    decode: Literal["exact", "fast"] = "exact"
    """fast decodes a JPEG much larger than --image-size at a fraction of its size; the checkpoint remembers it."""
    augment: Literal["none", "blip"] = "none"
    """blip: random crop, flip (not where a caption says left or right) and RandAugment(2, 5), as BLIP was trained."""

    # Optimisation
    epochs: int = 10
    """Passes over the training shards."""
    global_batch_size: int = 64
    """Images per optimizer step over all workers; each brings --captions-per-image captions."""
    micro_batch_size: int = 32
    """Images per forward pass of one worker; the number of passes per step follows."""
    captions_per_image: int = 5
    """Captions that share one vision pass; an image with more has them drawn by seed each epoch."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; it falls to zero along a cosine."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from zero."""
    weight_decay: float = 0.05
    """AdamW's weight decay, on matrices only."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    label_smoothing: float = 0.0
    """Share of the target probability spread over the vocabulary. BLIP's own recipe uses 0.1."""
    seed: int = 0
    """Seed of the weights, the sample order and dropout."""

    # Cluster
    num_workers: int = 2
    """Training processes; with GPUs, one each."""
    cpus_per_worker: int = 1
    """Ray CPUs and torch threads of one training process; reading and decoding take the CPUs that are left."""
    device: Device = "auto"
    """auto takes GPUs when the cluster has one for each worker, else CPUs."""
    dtype: Dtype = "auto"
    """auto computes in bf16 on a GPU and in fp32 on a CPU; weights and loss are fp32 in both."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: 1 shards optimizer state over workers, 2 gradients too, 3 parameters too."""
    max_failures: int = 3
    """How often the run restarts from its last checkpoint after losing a worker."""

    # Watching
    eval_every: int = 200
    """Steps between evaluations (loss and CIDEr on --val-shards); also at the end."""
    eval_images: int = 5000
    """Images of an evaluation, the first of --val-shards."""
    max_new_tokens: int = 24
    """Longest generated caption in tokens, end token included."""
    checkpoint_every: int = 200
    """Steps between checkpoints; also at the end."""
    log_every: int = 10
    """Steps between progress lines."""

    def __post_init__(self) -> None:
        _require_at_least(
            1,
            self,
            "image_size",
            "max_tokens",
            "epochs",
            "global_batch_size",
            "micro_batch_size",
            "captions_per_image",
            "num_workers",
            "cpus_per_worker",
            "run_length",
            "eval_every",
            "eval_images",
            "max_new_tokens",
            "checkpoint_every",
            "log_every",
        )
        _require_at_least(0, self, "warmup_steps", "weight_decay", "clip_norm", "max_failures")
        _require(
            self.run_length <= 128,
            f"--run-length must be at most 128, got {self.run_length}; batches would not be mixed",
        )
        _require(0 <= self.max_error_rate <= 1, f"--max-error-rate must be in [0, 1], got {self.max_error_rate}")
        _require(self.lr > 0, f"--lr must be positive, got {self.lr}")
        _require(0 <= self.label_smoothing < 1, f"--label-smoothing must be in [0, 1), got {self.label_smoothing}")
        _require(
            self.global_batch_size >= self.num_workers,
            f"--global-batch-size {self.global_batch_size} gives {self.num_workers} workers less than one image each",
        )
        _require(
            bool(self.train_shards) == bool(self.val_shards),
            "--train-shards and --val-shards go together; without both the demo",
        )
        _require(
            not (self.init_from and self.tokenizer),
            "--tokenizer is for a start from scratch; --init-from brings its own",
        )
        _require(
            bool(self.init_from or self.tokenizer or not self.train_shards),
            "a start from scratch on --train-shards needs --tokenizer; or give --init-from",
        )


TRAIN_PRESETS: dict[str, TrainConfig] = {
    # Measured on 2 cores (tests/bench/LOG.md): two captions a pass and small steps learn most in the minutes a demo has.
    "demo": TrainConfig(
        epochs=8,
        global_batch_size=32,
        micro_batch_size=16,
        captions_per_image=2,
        lr=2e-3,
        eval_every=250,
        checkpoint_every=250,
        log_every=25,
    ),
    # BLIP's published fine-tuning (configs/caption_coco.yaml): 5 epochs, 1e-5, 384 px, batch 256, label smoothing 0.1.
    "blip_base_coco": TrainConfig(
        out=default_root("blip_base_coco"),
        init_from="Salesforce/blip-image-captioning-base",
        image_size=384,
        prompt="a picture of ",
        max_tokens=40,
        epochs=5,
        global_batch_size=256,
        micro_batch_size=32,
        captions_per_image=5,
        lr=1e-5,
        warmup_steps=0,
        clip_norm=0.0,
        label_smoothing=0.1,
        augment="blip",
        num_workers=8,
        eval_every=1000,
        checkpoint_every=500,
    ),
}


def _demo(architecture: Architecture, **values: Any) -> TrainConfig:
    """The demo's training for another family: as long, on the same shards, into a folder of its own."""
    name = architecture.removesuffix("_tiny")
    return replace(TRAIN_PRESETS["demo"], architecture=architecture, out=default_root(f"demo_{name}"), **values)


CLIP_GPT2_PRESETS = {
    "demo": _demo("clip_gpt2_tiny"),
    # ClipCap's train.py (rmokady/CLIP_prefix_caption): 10 epochs, 2e-5, batch 40, 5,000 steps of warm-up, Transformers' AdamW
    # without decay. Its rate falls along a line, ours along a cosine; it takes each caption as a row of its own.
    "clip_gpt2_coco": TrainConfig(
        out=default_root("clip_gpt2_coco"),
        init_from=default_root("clip_gpt2"),  # what jobs/import_weights.py put together
        image_size=224,
        max_tokens=40,
        epochs=10,
        global_batch_size=40,
        micro_batch_size=20,
        captions_per_image=1,
        lr=2e-5,
        warmup_steps=5000,
        weight_decay=0.0,
        clip_norm=0.0,
        num_workers=2,
        eval_every=2000,
        checkpoint_every=1000,
    ),
}
VIT_GPT2_PRESETS = {
    "demo": _demo("vit_gpt2_tiny"),
    # Fine-tuning of the published model on captions like COCO's, as the table of the families does it.
    "vit_gpt2_coco": replace(
        TRAIN_PRESETS["blip_base_coco"],
        out=default_root("vit_gpt2_coco"),
        init_from="nlpconnect/vit-gpt2-image-captioning",
        image_size=224,
        prompt="",
        label_smoothing=0.0,
    ),
}
VGG_LSTM_PRESETS = {"demo": _demo("vgg_lstm_tiny")}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Checkpoint + split -> scores, captions, report.html. Without flags: the demo's checkpoint on its test split."""

    ROOTS: ClassVar = ("shards", "out")
    SOURCES: ClassVar = ("checkpoint", "scorer")

    checkpoint: str = ""
    """Checkpoint folder, local or s3://, or a hub name in Hugging Face's layout. Empty: checkpoint/ of the demo."""
    scorer: str = ""
    """Folder or hub name of BLIP's scorer, as Salesforce/blip-itm-base-coco: it picks among beams or draws."""
    shards: str = ""
    """Shards of the split: as jobs/prepare_shards.py writes them, or img2dataset's output as it is. Empty: the demo's test split."""
    out: str = default_root("demo")
    """Where metrics.json, captions.json, per_image.jsonl and report.html go, local or s3://."""
    max_images: int = 0
    """Evaluate only the first so many images; 0 takes all."""

    # Decoding. What is left empty or 0 is the checkpoint's own.
    prompt: str = ""
    """Text in front of every caption; empty is the checkpoint's own."""
    num_beams: int = 0
    """Beams of the search; 1 is greedy, 0 the checkpoint's own number."""
    max_new_tokens: int = 0
    """Longest caption in tokens, end token included; 0 is the checkpoint's own."""
    decode_settings: str = ""
    """JSON object of other settings: {"repetition_penalty": 1.2, "do_sample": true, "top_p": 0.9, "banned_words": ["photo"]},
    or {"num_beams": 5, "required_words": ["dog"]}."""

    # Cluster
    micro_batch_size: int = 64
    """Images per forward pass."""
    concurrency: int = 1
    """Captioner processes."""
    device: Device = "auto"
    """auto takes a GPU when the cluster has one for each process, else CPUs."""

    def __post_init__(self) -> None:
        _require(
            min(self.micro_batch_size, self.concurrency) >= 1, "--micro-batch-size and --concurrency must be at least 1"
        )
        _require_at_least(0, self, "max_images", "num_beams", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class CaptionBucketConfig:
    """Checkpoint + folder or bucket of images -> one caption row per image. Run again to resume. Without flags: the demo."""

    ROOTS: ClassVar = ("images", "out")
    SOURCES: ClassVar = ("checkpoint", "scorer")  # a folder, or else a hub name

    checkpoint: str = ""
    """Checkpoint folder, local or s3://, or a hub name in Hugging Face's layout. Empty: checkpoint/ of the demo."""
    scorer: str = ""
    """Folder or hub name of BLIP's scorer, as Salesforce/blip-itm-base-coco: it picks among beams or draws."""
    images: str = ""
    """Folder or s3:// root; every image below it gets one row. Empty: the demo's bucket."""
    out: str = default_root("demo/captions")
    """Folder or s3:// root for the rows: data/, _SUCCESS.json. Another checkpoint or other settings in it are refused."""
    format: Literal["parquet", "jsonl"] = "parquet"
    """Format of the files below data/."""
    suffixes: str = ".jpg,.jpeg,.png,.webp,.gif,.bmp,.tif,.tiff,.avif"
    """File names that count as images, upper or lower case; * takes every file. The content alone decides the format."""
    leftovers: bool = False
    """Take what programs leave beside images too: ._*, __MACOSX/, @eaDir/, .Trash*/, .ipynb_checkpoints/ and the like."""
    max_error_rate: float = 0.05
    """Share of the images that the storage may not give (unreadable); more is no success. Broken images are rows, in any number."""
    unit_size: int = 256
    """Images in one output file, which is written once and whole; a kill loses at most the units at work."""

    # Decoding. What is left empty or 0 is the checkpoint's own.
    prompt: str = ""
    """Text in front of every caption; empty is the checkpoint's own."""
    num_beams: int = 0
    """Beams of the search; 1 is greedy, 0 the checkpoint's own number."""
    max_new_tokens: int = 0
    """Longest caption in tokens, end token included; 0 is the checkpoint's own."""
    num_candidates: int = 0
    """Best beams, or draws, to write as candidates with their scores; 0 writes none."""
    decode_settings: str = ""
    """JSON object of other settings: {"repetition_penalty": 1.2, "do_sample": true, "top_p": 0.9, "banned_words": ["photo"]},
    or {"num_beams": 5, "required_words": ["dog"]}."""

    # Cluster
    micro_batch_size: int = 32
    """Images per forward pass."""
    concurrency: int = 1
    """Captioner processes."""
    device: Device = "auto"
    """auto takes GPUs when the cluster has enough for each captioner, else CPUs."""
    dtype: Dtype = "auto"
    """auto computes in bf16 on a GPU and in fp32 on a CPU."""
    num_gpus: float = 1.0
    """GPUs of one captioner; a fraction lets several share one. Counts only on GPUs."""
    cpus_for_data: int = 1
    """Tasks that read and decode images at once, each with one Ray CPU."""
    decode_timeout_s: float = 10.0
    """Longest time for one image to be decoded; longer is an error row."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "unit_size", "micro_batch_size", "concurrency", "cpus_for_data")
        _require_at_least(0, self, "num_beams", "max_new_tokens", "num_candidates")
        _require_gpus(self.num_gpus)
        _require(self.decode_timeout_s > 0, f"--decode-timeout-s must be positive, got {self.decode_timeout_s}")
        _require(bool(self.suffixes.strip(" ,")), "--suffixes is empty; name some, or * for every file")
        _require(0 <= self.max_error_rate <= 1, f"--max-error-rate must be in [0, 1], got {self.max_error_rate}")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Checkpoint -> HTTP endpoint: POST an image to /v1/caption. Without flags: the demo's checkpoint on loopback."""

    ROOTS: ClassVar = ()
    SOURCES: ClassVar = ("checkpoint", "scorer")

    checkpoint: str = ""
    """Checkpoint folder, local or s3://, or a hub name in Hugging Face's layout. Empty: checkpoint/ of the demo."""
    scorer: str = ""
    """Folder or hub name of BLIP's scorer, as Salesforce/blip-itm-base-coco: it picks among beams or draws."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but loopback needs a bearer token in the environment variable RAYCAP_TOKEN."""
    port: int = 8000
    """Port to listen on."""

    # Decoding. What is left empty or 0 is the checkpoint's own.
    prompt: str = ""
    """Text in front of every caption; empty is the checkpoint's own."""
    num_beams: int = 0
    """Beams of the search; 1 is greedy, 0 the checkpoint's own number."""
    max_new_tokens: int = 0
    """Longest caption in tokens, end token included; 0 is the checkpoint's own."""
    num_candidates: int = 0
    """Best beams, or draws, to answer as candidates with their scores; 0 answers none."""
    decode_settings: str = ""
    """JSON object of other settings: {"repetition_penalty": 1.2, "do_sample": true, "top_p": 0.9, "banned_words": ["photo"]},
    or {"num_beams": 5, "required_words": ["dog"]}."""

    # Limits
    max_body_bytes: int = 20 * 2**20
    """Largest request body; more is refused with 413 while it arrives."""
    max_queue: int = 64
    """Requests that one replica holds at once, at work or waiting; more are refused with 429."""
    request_timeout_s: float = 30.0
    """Longest time for one request, its upload included."""
    decode_timeout_s: float = 10.0
    """Longest time for one image to be decoded."""
    decode_workers: int = 1
    """Processes that decode images, per HTTP replica."""

    # Cluster
    micro_batch_size: int = 16
    """Images per forward pass."""
    batch_wait_s: float = 0.005
    """How long a captioner waits for more images before it starts on fewer."""
    num_replicas: int = 1
    """Captioner processes."""
    device: Device = "auto"
    """auto takes GPUs when the cluster has enough for each captioner, else CPUs."""
    dtype: Dtype = "auto"
    """auto computes in bf16 on a GPU and in fp32 on a CPU."""
    num_gpus: float = 1.0
    """GPUs of one captioner; a fraction lets several share one. Counts only on GPUs."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "max_body_bytes", "max_queue", "decode_workers", "micro_batch_size", "num_replicas")
        _require_at_least(0, self, "num_beams", "max_new_tokens", "num_candidates")
        _require(
            self.max_body_bytes <= 64 * 2**20,  # raycap.image.MAX_BYTES: larger ones would be refused all the same
            f"--max-body-bytes must be at most {64 * 2**20}, got {self.max_body_bytes}",
        )
        _require(1 <= self.port <= 65535, f"--port must be in [1, 65535], got {self.port}")
        _require_gpus(self.num_gpus)
        _require(
            min(self.request_timeout_s, self.decode_timeout_s) > 0,
            f"--request-timeout-s and --decode-timeout-s must be positive, got {self.request_timeout_s} and {self.decode_timeout_s}",
        )
        _require(self.batch_wait_s >= 0, f"--batch-wait-s must not be negative, got {self.batch_wait_s}")
