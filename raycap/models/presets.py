"""The published architectures as configurations, each with its source, and tiny ones for tests and the demo.

A preset is what config.json holds. Vocabulary, special ids, image size and text length may be others in a model trained
from scratch; the rest is the architecture.
"""

from typing import Any

from raycap.schema import ImageSpec

Config = dict[str, Any]

_VIT_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_BERT_BASE = {**_VIT_BASE, "vocab_size": 30_524, "max_position_embeddings": 512, "hidden_act": "gelu"}
# BERT's 30,522 tokens, [DEC] and [ENC]; a caption ends with [SEP] (salesforce/BLIP, models/blip.py, init_tokenizer).
_BLIP_IDS = {"bos_token_id": 30_522, "pad_token_id": 0, "sep_token_id": 102, "eos_token_id": 102}
_GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50_257}
_GPT2_IDS = {"bos_token_id": 50_256, "eos_token_id": 50_256, "pad_token_id": 50_256}

# Salesforce/blip-image-captioning-base: ViT-B/16 at 384 pixels (Li et al. 2022, arXiv:2201.12086). initializer_range of
# the tower is timm's; transformers' default for BLIP is 1e-10, a tower that sees nothing.
BLIP_BASE_384: Config = {
    "model_type": "blip",
    "vision_config": {**_VIT_BASE, "image_size": 384, "patch_size": 16, "initializer_range": 0.02},
    "text_config": {**_BERT_BASE, **_BLIP_IDS, "encoder_hidden_size": 768},
}
# Salesforce/blip-image-captioning-large: ViT-L/16, the same text decoder.
BLIP_LARGE_384: Config = {
    "model_type": "blip",
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 16,
        "initializer_range": 0.02,
    },
    "text_config": {**_BERT_BASE, **_BLIP_IDS, "encoder_hidden_size": 1024},
}
# openai/clip-vit-base-patch32's vision tower.
_CLIP_VIT_B_32 = {
    "model_type": "clip_vision_model",
    **_VIT_BASE,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
}
# ClipCap with the MLP, GPT-2 trained (Mokady et al. 2021, arXiv:2111.09734; rmokady/CLIP_prefix_caption, train.py).
CLIP_GPT2_MLP: Config = {
    "model_type": "clip_gpt2",
    "vision_config": _CLIP_VIT_B_32,
    "text_config": {**_GPT2, **_GPT2_IDS},
    "mapper": "mlp",
    "prefix_length": 10,
    "freeze_vision": True,
    "freeze_text": "none",
}
# ClipCap with the transformer, GPT-2 frozen; K = 10 as in section 4 of the paper.
CLIP_GPT2_TRANSFORMER: Config = {
    **CLIP_GPT2_MLP,
    "mapper": "transformer",
    "clip_length": 10,
    "num_mapper_layers": 8,
    "num_mapper_heads": 8,
    "freeze_text": "all",
}
# nlpconnect/vit-gpt2-image-captioning: google/vit-base-patch16-224-in21k and gpt2.
VIT_GPT2: Config = {
    "model_type": "vision-encoder-decoder",
    "encoder": {"model_type": "vit", **_VIT_BASE, "image_size": 224, "patch_size": 16},
    "decoder": {"model_type": "gpt2", **_GPT2, **_GPT2_IDS, "add_cross_attention": True, "is_decoder": True},
    "decoder_start_token_id": 50_256,
    "pad_token_id": 50_256,
    "eos_token_id": 50_256,
}
# VGG16 (Simonyan and Zisserman 2014, arXiv:1409.1556, configuration D), an LSTM of 512 with soft attention over the
# 14 x 14 map (Xu et al. 2015, arXiv:1502.03044).
VGG_LSTM: Config = {
    "model_type": "vgg_lstm",
    "image_size": 224,
    "vocab_size": 10_000,
    "embedding_size": 512,
    "hidden_size": 512,
    "dropout": 0.5,
    "attention": True,
    "freeze_vision": True,
}

_TINY = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
_TINY_GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 200}
_TINY_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TINY_VIT = {**_TINY, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16}
BLIP_TINY: Config = {
    "model_type": "blip",
    "vision_config": {**_TINY_VIT, "initializer_range": 0.02},
    "text_config": {
        **_TINY,
        **_TINY_IDS,
        "sep_token_id": 2,
        "num_hidden_layers": 2,
        "encoder_hidden_size": 128,
        "vocab_size": 200,
        "max_position_embeddings": 64,
    },
}
CLIP_GPT2_TINY: Config = {
    "model_type": "clip_gpt2",
    "vision_config": {"model_type": "clip_vision_model", **_TINY_VIT, "projection_dim": 128},
    "text_config": {**_TINY_GPT2, **_TINY_IDS},
    "mapper": "mlp",
    "prefix_length": 4,
    "freeze_vision": False,
    "freeze_text": "none",
}
VIT_GPT2_TINY: Config = {
    "model_type": "vision-encoder-decoder",
    "encoder": {"model_type": "vit", **_TINY_VIT, "add_pooling_layer": False},
    "decoder": {"model_type": "gpt2", **_TINY_GPT2, **_TINY_IDS, "add_cross_attention": True, "is_decoder": True},
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
VGG_LSTM_TINY: Config = {
    "model_type": "vgg_lstm",
    "image_size": 64,
    "vocab_size": 200,
    "embedding_size": 128,
    "hidden_size": 128,
    "dropout": 0.1,
    "attention": True,
    "vgg_channels": [[16], [32], [64], [128], [128]],
    "vgg_fc_size": 256,
    "freeze_vision": False,
}

PRESETS: dict[str, Config] = {
    "blip_tiny": BLIP_TINY,
    "blip_base_384": BLIP_BASE_384,
    "blip_large_384": BLIP_LARGE_384,
    "clip_gpt2_tiny": CLIP_GPT2_TINY,
    "clip_gpt2_mlp": CLIP_GPT2_MLP,
    "clip_gpt2_transformer": CLIP_GPT2_TRANSFORMER,
    "vit_gpt2_tiny": VIT_GPT2_TINY,
    "vit_gpt2": VIT_GPT2,
    "vgg_lstm_tiny": VGG_LSTM_TINY,
    "vgg_lstm": VGG_LSTM,
}

# How each kind prepares images when it starts from scratch: as its published weights want them.
IMAGES = {
    "blip": ImageSpec(size=384),
    "clip_gpt2": ImageSpec(size=224, fit="crop"),
    "vision-encoder-decoder": ImageSpec(size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resample="bilinear"),
    "vgg_lstm": ImageSpec(  # torchvision's weights
        size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resample="bilinear", fit="crop"
    ),
}
