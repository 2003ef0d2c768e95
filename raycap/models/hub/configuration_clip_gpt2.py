"""The configuration of CLIP-GPT2: what config.json holds, checked. Imports nothing of raycap, as it is exported too."""

# mypy: allow-untyped-calls
# because transformers leaves some of what is called here without types

from typing import Any

from transformers import AutoConfig, GPT2Config, PretrainedConfig

from .prefix_clip_gpt2 import MAPPERS, TOWERS


class ClipGpt2Config(PretrainedConfig):
    """A vision tower, a mapper from its vector to prefix_length visual tokens, and GPT-2, which goes on from these.

    vision_config: a dict with its model_type, one of CLIP's, ViT's, SigLIP's and DINOv2's vision towers. text_config: of
    GPT-2. mapper: "linear_tanh", or ClipCap's "mlp" or "transformer" (arXiv:2111.09734, section 3.2). clip_length,
    num_mapper_layers, num_mapper_heads: of the transformer mapper alone. normalize_prefix: the vector is divided by its L2
    norm. Defaults are those of ClipCap's train.py with CLIP ViT-B/32 and the MLP.

    What is not trained: freeze_vision the whole tower, freeze_text GPT-2 ("all", "none", or a number of its first
    blocks, which leaves the embeddings to training). Used by raycap; transformers freezes nothing by itself.

    Raises ValueError, naming the field, for values that mean nothing.
    """

    model_type = "clip_gpt2"
    sub_configs = {"vision_config": AutoConfig, "text_config": GPT2Config}  # noqa: RUF012  # transformers' own way

    def __init__(
        self,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        text_config: dict[str, Any] | GPT2Config | None = None,
        prefix_length: int = 10,
        clip_length: int = 10,
        mapper: str = "mlp",
        num_mapper_layers: int = 8,
        num_mapper_heads: int = 8,
        normalize_prefix: bool = False,
        freeze_vision: bool = True,
        freeze_text: str | int = "none",
        **kwargs: Any,
    ) -> None:
        self.vision_config = _vision_config({"model_type": TOWERS[0]} if vision_config is None else vision_config)
        self.text_config = _text_config({} if text_config is None else text_config)
        self.prefix_length = prefix_length
        self.clip_length = clip_length
        self.mapper = mapper
        self.num_mapper_layers = num_mapper_layers
        self.num_mapper_heads = num_mapper_heads
        self.normalize_prefix = normalize_prefix
        self.freeze_vision = freeze_vision
        self.freeze_text = freeze_text
        self._check()
        is_tied = self.text_config.tie_word_embeddings
        if kwargs.setdefault("tie_word_embeddings", is_tied) != is_tied:
            raise ValueError("tie_word_embeddings and text_config.tie_word_embeddings differ; give both the same value")
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):  # where generate() looks for them
            kwargs.setdefault(role, getattr(self.text_config, role))
        super().__init__(**kwargs)

    def _check(self) -> None:
        if self.mapper not in MAPPERS:
            raise ValueError(f"mapper is {self.mapper!r}; give one of {', '.join(MAPPERS)}")
        for name in ("prefix_length", "clip_length", "num_mapper_layers", "num_mapper_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; give a number from 1")
        for name in ("normalize_prefix", "freeze_vision"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give true or false")
        width, num_positions, num_layers = (getattr(self.text_config, n) for n in ("n_embd", "n_positions", "n_layer"))
        if self.prefix_length >= num_positions:
            raise ValueError(
                f"prefix_length is {self.prefix_length}, which leaves no room for text in the {num_positions} positions "
                f"of text_config.n_positions; give a smaller one"
            )
        if self.mapper == "transformer" and width % self.num_mapper_heads:
            raise ValueError(
                f"num_mapper_heads is {self.num_mapper_heads}, which does not divide text_config.n_embd = {width}; give a "
                f"number that does"
            )
        frozen = self.freeze_text
        is_number = isinstance(frozen, int) and not isinstance(frozen, bool)
        if frozen not in ("none", "all") and not (is_number and 0 <= int(frozen) <= num_layers):
            raise ValueError(
                f"freeze_text is {frozen!r}; give none, all, or how many of the first blocks, up to {num_layers}"
            )


def _vision_config(given: dict[str, Any] | PretrainedConfig) -> PretrainedConfig:
    model_type = given.get("model_type") if isinstance(given, dict) else given.model_type
    if model_type not in TOWERS:
        raise ValueError(f"vision_config.model_type is {model_type!r}; give one of {', '.join(TOWERS)}")
    config: Any = AutoConfig.for_model(**given) if isinstance(given, dict) else given
    if not isinstance(config.image_size, int):
        raise ValueError(f"vision_config.image_size is {config.image_size!r}; give one number: images are square")
    if not getattr(config, "vision_use_head", True):
        raise ValueError("vision_config.vision_use_head is false; give a SigLIP tower with its pooling head")
    checked: PretrainedConfig = config
    return checked


def _text_config(given: dict[str, Any] | GPT2Config) -> GPT2Config:
    model_type = given.get("model_type", "gpt2") if isinstance(given, dict) else given.model_type
    if model_type != "gpt2":
        raise ValueError(f"text_config.model_type is {model_type!r}; give gpt2")
    config = GPT2Config(**given) if isinstance(given, dict) else given
    if config.add_cross_attention:
        raise ValueError("text_config.add_cross_attention is true; give false: GPT-2 reads the image as visual tokens")
    return config
