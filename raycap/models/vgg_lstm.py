"""The baselines: VGG16 and an LSTM, as in Show and Tell, or with soft attention as in Show, Attend and Tell.

Show and Tell (Vinyals et al. 2015, arXiv:1411.4555) reads VGG16's fc7 vector as the first input of the LSTM. Show, Attend and
Tell (Xu et al. 2015, arXiv:1502.03044) begins from the mean of the conv5_3 map and looks at the map before every token.
Owns the networks and their decode state; not the sum of their loss (loss.py), not the search (raycap/decoding), and not the
normalisation of pixels (ImageSpec: ImageNet's mean and std for published weights). The doubly stochastic regularisation of
Xu et al. (4.2.1) is left out.

VGG16's parameters have torchvision's names (features.0.weight ... classifier.3.bias), so that its published state dict
loads by a selection of names. The captions or beams of an image share its map: they are more queries, never copies of it.

Every parameter is used inside forward() of the module that owns it, and modules are only called, never reached into:
DeepSpeed ZeRO-3 gathers parameters in forward hooks. How often a module is called does not depend on the length of the
text, because the ranks of a run read texts of different lengths and gather together: so the loop over tokens is inside
AttentionLstm, which owns all that it uses.

Shape suffixes: B images, N text rows (image i owns rows i*k .. i*k+k-1, k = N // B), L text length, P prompt length,
M text positions with a target, V vocabulary, D width of a word, H width of the LSTM, T places of an image, E width of a
place, A width of the attention (E, as in the authors' code), S side of the image in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycap.models.cache import check_rows
from raycap.models.loss import summed_token_loss

KIND = "vgg_lstm"
# Configuration D of Simonyan and Zisserman (arXiv:1409.1556, table 1): five groups, each followed by a max pooling.
VGG16_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
POOLED_SIDE = 7  # of the map that the first linear layer reads (torchvision, models/vgg.py)
CONVOLUTIONS = tuple(f"features.{n}" for n in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28))  # torchvision's names
FOLDER_KEYS = ("model_type", "architectures")  # of a config.json, beside the fields of VggLstmConfig
UNIFORM_SCALE = 0.08  # initializer_scale of Show and Tell's code (tensorflow/models, im2txt/configuration.py)

Rows = tuple[Tensor, Tensor]
"""hidden_NH and cell_NH: all that an LSTM keeps of the text so far."""


@dataclass(frozen=True, kw_only=True)
class VggLstmConfig:
    """What a config.json of model_type "vgg_lstm" holds. Raises ValueError, naming the field.

    attention: False is Show and Tell, True is Show, Attend and Tell. vgg_channels: of the convolutions in each of the five
    groups. vgg_fc_size: width of fc6 and fc7, used without attention. freeze_vision: VGG16 gets no gradient and no dropout.
    """

    vocab_size: int
    image_size: int = 224
    embedding_size: int = 512
    hidden_size: int = 512
    dropout: float = 0.5
    label_smoothing: float = 0.0
    attention: bool = False
    vgg_channels: Sequence[Sequence[int]] = VGG16_CHANNELS
    vgg_fc_size: int = 4096
    freeze_vision: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "image_size", "embedding_size", "hidden_size", "vgg_fc_size"):
            if not _is_size(getattr(self, name)):
                raise _refused(name, getattr(self, name), "a whole number from 1")
        if self.image_size % 32:
            raise _refused("image_size", self.image_size, "a multiple of 32, because VGG16 halves an image five times")
        for name in ("attention", "freeze_vision"):
            if not isinstance(getattr(self, name), bool):
                raise _refused(name, getattr(self, name), "true or false")
        for name in ("dropout", "label_smoothing"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                raise _refused(name, share, "a number from 0 to less than 1")
        groups: object = self.vgg_channels
        if not isinstance(groups, list | tuple) or len(groups) != 5 or not all(map(_is_group, groups)):
            raise _refused("vgg_channels", groups, "five lists of whole numbers from 1")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VggLstmConfig":
        known = [field.name for field in fields(cls)]
        unknown = [name for name in config if name not in (*known, *FOLDER_KEYS)]
        if unknown:
            raise ValueError(f"a {KIND} config has no field {unknown[0]!r}; its fields are {', '.join(known)}")
        if config.get("model_type", KIND) != KIND:
            raise _refused("model_type", config["model_type"], repr(KIND))
        if "vocab_size" not in config:
            raise ValueError(f"a {KIND} config needs vocab_size, which this one does not give; add it")
        return cls(**{name: value for name, value in config.items() if name in known})


@dataclass(frozen=True)
class ImageState:
    """What text rows look at: the places of the conv5_3 map, row by row, or with T = 1 the fc7 vector.

    keys_BTA: what attention compares with. loss() and start() make them, so that each has the graph it needs, or none.
    """

    features_BTE: Tensor
    keys_BTA: Tensor | None = None

    @property
    def num_images(self) -> int:
        return len(self.features_BTE)

    def select(self, images: Tensor) -> "ImageState":
        """A new state for decoding, of the images at these positions, in this order."""
        return ImageState(self.features_BTE[images], None if self.keys_BTA is None else self.keys_BTA[images])


class LstmDecodeState:
    """The text so far of N = B * beams rows, and the image state they share."""

    def __init__(self, image: ImageState, rows: Rows) -> None:
        self.image = image
        self.rows = rows
        self.num_rows = len(rows[0])

    def reorder(self, index_N: Tensor) -> None:
        """Row r goes on from the text of row index_N[r], which must belong to the same image."""
        hidden_NH, cell_NH = self.rows
        self.rows = hidden_NH.index_select(0, index_N), cell_NH.index_select(0, index_N)
        self.num_rows = len(index_N)

    def keep(self, images: Tensor) -> None:
        """Drop every image but those at these positions, with all their rows. start()'s image state is untouched."""
        rows = torch.arange(self.num_rows, device=images.device).view(self.image.num_images, -1)[images]
        self.image = self.image.select(images)
        self.reorder(rows.flatten())


class AttentionLstm(nn.Module):
    """Section 3.1 of Xu et al., equations 1 to 6, with soft attention (4.2) and the gate beta (4.2.1).

    The LSTM's parameters are named and ordered as torch.nn.LSTMCell's. The score has no bias: softmax would cancel it.
    """

    def __init__(self, config: VggLstmConfig, num_channels: int) -> None:
        super().__init__()
        H, E = config.hidden_size, num_channels
        self.weight_ih = nn.Parameter(torch.empty(4 * H, config.embedding_size + E))
        self.weight_hh = nn.Parameter(torch.empty(4 * H, H))
        self.bias_ih = nn.Parameter(torch.empty(4 * H))
        self.bias_hh = nn.Parameter(torch.empty(4 * H))
        self.query_weight = nn.Parameter(torch.empty(E, H))
        self.score_weight = nn.Parameter(torch.empty(1, E))
        self.beta_weight = nn.Parameter(torch.empty(1, H))
        self.beta_bias = nn.Parameter(torch.empty(1))

    def forward(self, words_NLD: Tensor, image: ImageState, rows: Rows) -> tuple[Tensor, Tensor, Rows]:
        """hidden_NLH after each word, the gated contexts_NLE that were read with it, and the rows after the last."""
        annotations_BTE, keys_BTA = image.features_BTE, image.keys_BTA
        assert keys_BTA is not None, "loss() and start() make the keys"
        hidden_NH, cell_NH = rows
        B, _, E = annotations_BTE.shape
        hiddens, contexts = [], []
        for word_ND in words_NLD.unbind(dim=1):
            query_NA = F.linear(hidden_NH, self.query_weight)
            # In place: only the result of tanh is needed for its gradient, and it is the largest tensor of a step.
            mixed_BkTA = (keys_BTA[:, None] + query_NA.view(B, -1, 1, E)).tanh_()
            weights_BkT = F.linear(mixed_BkTA, self.score_weight)[..., 0].softmax(dim=-1)
            context_NE = torch.bmm(weights_BkT.to(annotations_BTE.dtype), annotations_BTE).view(-1, E)
            context_NE = F.linear(hidden_NH, self.beta_weight, self.beta_bias).sigmoid() * context_NE
            hidden_NH, cell_NH = torch.lstm_cell(
                torch.cat([word_ND, context_NE], dim=1),
                (hidden_NH, cell_NH),
                self.weight_ih,
                self.weight_hh,
                self.bias_ih,
                self.bias_hh,
            )
            hiddens.append(hidden_NH)
            contexts.append(context_NE)
        return torch.stack(hiddens, dim=1), torch.stack(contexts, dim=1), (hidden_NH, cell_NH)


class PlainOutput(nn.Module):
    """Logits of Show and Tell: dropout on the LSTM's output, then one linear layer."""

    def __init__(self, config: VggLstmConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.vocabulary = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Over the last dimension, float32 or wider."""
        return _at_least_float32(self.vocabulary(self.dropout(hidden)))


class DeepOutput(nn.Module):
    """Logits of Show, Attend and Tell: equation 7, with the tanh and the two dropouts of the authors' code.

    (kelvinxu/arctic-captions, capgen.py, build_model; the equation itself has no tanh.)
    """

    def __init__(self, config: VggLstmConfig, num_channels: int) -> None:
        super().__init__()
        self.widths = [config.hidden_size, num_channels, config.embedding_size]
        self.dropout = nn.Dropout(config.dropout)
        self.hidden = nn.Linear(config.hidden_size, config.embedding_size)
        self.context = nn.Linear(num_channels, config.embedding_size)
        self.vocabulary = nn.Linear(config.embedding_size, config.vocab_size)

    def forward(self, read: Tensor) -> Tensor:
        """Over the last dimension, float32 or wider. read: hidden, context and the word before, side by side."""
        hidden, context, word = torch.split(read, self.widths, dim=-1)
        mixed = torch.tanh(word + self.hidden(self.dropout(hidden)) + self.context(context))
        return _at_least_float32(self.vocabulary(self.dropout(mixed)))


class VggLstm(nn.Module):
    """The captioning model of raycap/decoding/protocol.py: see CaptionModel there for the contract of each method."""

    counts_prompt = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        """config: see VggLstmConfig."""
        super().__init__()
        self.config = settings = VggLstmConfig.from_dict(config)
        num_channels, D, H = settings.vgg_channels[-1][-1], settings.embedding_size, settings.hidden_size
        self.features = _convolutions(settings.vgg_channels, last_pool=not settings.attention)
        self.word_embeddings = nn.Embedding(settings.vocab_size, D)
        self.lstm: nn.Module
        if settings.attention:
            self.key = nn.Linear(num_channels, num_channels)
            self.init_hidden = nn.Sequential(nn.Linear(num_channels, H), nn.Tanh())
            self.init_cell = nn.Sequential(nn.Linear(num_channels, H), nn.Tanh())
            self.lstm = AttentionLstm(settings, num_channels)
            self.output: nn.Module = DeepOutput(settings, num_channels)
        else:
            self.avgpool = nn.AdaptiveAvgPool2d(POOLED_SIDE)
            self.classifier = nn.Sequential(  # torchvision's up to fc7: its layers 0 to 4 of 6
                nn.Linear(num_channels * POOLED_SIDE**2, settings.vgg_fc_size),
                nn.ReLU(inplace=True),
                nn.Dropout(0.0 if settings.freeze_vision else settings.dropout),
                nn.Linear(settings.vgg_fc_size, settings.vgg_fc_size),
                nn.ReLU(inplace=True),
            )
            self.image_embedding = nn.Linear(settings.vgg_fc_size, D)
            self.input_dropout = nn.Dropout(settings.dropout)
            self.lstm = nn.LSTM(D, H, batch_first=True)
            self.output = PlainOutput(settings)
        for name, parameter in self.named_parameters():
            _initialise(name, parameter)
            if settings.freeze_vision and _is_vision(name):
                parameter.requires_grad_(False)

    def encode_image(self, pixel_values_B3SS: Tensor) -> ImageState:
        size = self.config.image_size
        if pixel_values_B3SS.shape[1:] != (3, size, size):
            raise ValueError(
                f"this {KIND} takes pixel_values (images, 3, {size}, {size}), got {tuple(pixel_values_B3SS.shape)}"
            )
        dtype = next(self.features.parameters()).dtype
        map_BEyx = self.features(pixel_values_B3SS.to(dtype))
        if self.config.attention:
            return ImageState(map_BEyx.flatten(2).transpose(1, 2))
        return ImageState(self.classifier(self.avgpool(map_BEyx).flatten(1))[:, None])

    def loss(self, state: ImageState, input_ids_NL: Tensor, labels_NL: Tensor) -> tuple[Tensor, Tensor]:
        # Position l predicts the label of l + 1. An LSTM looks back only, so padding on the right is seen by no target.
        check_rows(len(input_ids_NL), state)
        image, rows_B = self._begin(state)
        read, _ = self._read(input_ids_NL[:, :-1], image, _repeat(rows_B, len(input_ids_NL) // state.num_images))
        return summed_token_loss(self.output, read, labels_NL[:, 1:], self.config.label_smoothing)

    def forward(self, pixel_values_B3SS: Tensor, input_ids_NL: Tensor, labels_NL: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(self.encode_image(pixel_values_B3SS), input_ids_NL, labels_NL)

    @torch.no_grad()
    def start(self, state: ImageState, prompt_ids_P: Tensor, beams: int = 1) -> LstmDecodeState:
        image, rows_B = self._begin(state)
        if len(prompt_ids_P) > 1:
            _, rows_B = self._read(prompt_ids_P[:-1].expand(state.num_images, -1), image, rows_B)
        return LstmDecodeState(image, _repeat(rows_B, beams))

    @torch.no_grad()
    def step(self, state: LstmDecodeState, ids_N: Tensor) -> Tensor:
        read, state.rows = self._read(ids_N[:, None], state.image, state.rows)
        logits_NV: Tensor = self.output(read[:, 0])
        return logits_NV

    def _begin(self, state: ImageState) -> tuple[ImageState, Rows]:
        """The image state that tokens are read with, and the rows before the first token, one an image."""
        if self.config.attention:
            mean_BE = state.features_BTE.mean(dim=1)
            image = replace(state, keys_BTA=self.key(state.features_BTE))
            return image, (self.init_hidden(mean_BE), self.init_cell(mean_BE))
        _, (hidden_1BH, cell_1BH) = self.lstm(self.input_dropout(self.image_embedding(state.features_BTE)))
        return state, (hidden_1BH[0], cell_1BH[0])

    def _read(self, ids_NL: Tensor, image: ImageState, rows: Rows) -> tuple[Tensor, Rows]:
        """What `output` makes logits of (N, L, its width), and the rows after the last token."""
        words_NLD = self.word_embeddings(ids_NL)
        if self.config.attention:
            hidden_NLH, contexts_NLE, rows = self.lstm(words_NLD, image, rows)
            return torch.cat([hidden_NLH, contexts_NLE, words_NLD], dim=-1), rows
        hidden_NLH, (hidden_1NH, cell_1NH) = self.lstm(self.input_dropout(words_NLD), (rows[0][None], rows[1][None]))
        return hidden_NLH, (hidden_1NH[0], cell_1NH[0])


def import_torchvision(state_dict: Mapping[str, Tensor], *, attention: bool = False) -> dict[str, Tensor]:
    """VGG16's weights of torchvision's vgg16 by the names of VggLstm, which are the same: only a selection is made.

    attention: as in VggLstmConfig; with it the convolutions alone. Raises ValueError for the weights of another network.
    """
    layers = (*CONVOLUTIONS, "classifier.0", "classifier.3", "classifier.6")  # the last gives ImageNet's 1,000 classes
    published = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    wanted = published[: 2 * len(CONVOLUTIONS)] if attention else published[:-2]
    missing = [name for name in wanted if name not in state_dict]
    unknown = [name for name in state_dict if name not in published]
    if missing or unknown:
        raise ValueError(
            f"these are not the weights of torchvision's vgg16: {len(missing)} tensors are missing and {len(unknown)} unknown "
            f"(first: {(missing + unknown)[0]!r}); give the state dict of that network"
        )
    return {name: state_dict[name] for name in wanted}


def _convolutions(groups: Sequence[Sequence[int]], last_pool: bool) -> nn.Sequential:
    """VGG16's convolutions, numbered as torchvision's. Without the last pooling the result is the conv5_3 map."""
    layers: list[nn.Module] = []
    width = 3
    for group in groups:
        for channels in group:
            layers += [nn.Conv2d(width, channels, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
            width = channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*(layers if last_pool else layers[:-1]))


def _initialise(name: str, parameter: Tensor) -> None:
    """VGG16 as torchvision draws it (models/vgg.py), the rest as Show and Tell's code (its LSTM's forget_bias is 1)."""
    if name.endswith("bias") or "bias_" in name:
        nn.init.zeros_(parameter)
        if "bias_ih" in name:  # gates in torch's order: input, forget, cell, output
            nn.init.ones_(parameter.detach().view(4, -1)[1])
    elif name.startswith("features."):
        nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
    elif name.startswith("classifier."):
        nn.init.normal_(parameter, std=0.01)
    else:
        nn.init.uniform_(parameter, -UNIFORM_SCALE, UNIFORM_SCALE)


def _is_vision(name: str) -> bool:
    return name.startswith(("features.", "classifier."))


def _repeat(rows: Rows, times: int) -> Rows:
    hidden, cell = rows
    return hidden.repeat_interleave(times, dim=0), cell.repeat_interleave(times, dim=0)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_group(group: object) -> bool:
    return isinstance(group, list | tuple) and len(group) > 0 and all(map(_is_size, group))


def _refused(name: str, value: object, wanted: str) -> ValueError:
    return ValueError(f"{name} is {value!r} in a {KIND} config; give {wanted}")
