"""Image encoder: vision trunk, with patch projection or convolutional stem, and head."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import UserError
from toolkit.config.validate import stem_supports
from toolkit.model.architectures import TRUNKS, ImageArchitecture
from toolkit.model.layers import FrozenLinear, Head
from toolkit.model.outputs import Encoded, Features
from toolkit.model.trunk import PartlyFrozen, masks_of, run_layer, trained_layers

# Of OpenAI's CLIP; BLIP-2 uses the same.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
GRID = 4  # cells per side for `pool` "grid"


class StemConvolution(nn.Conv2d):
    """Convolution that computes in float32 for bfloat16 inputs on CPUs, whose narrow bf16 convolutions can be wrong."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Convolve [B, C, S, S]; the output has the dtype of the input."""
        if pixels.dtype != torch.bfloat16 or pixels.device.type != "cpu":
            return super().forward(pixels)
        return F.conv2d(pixels.float(), self.weight.float(), None, self.stride, self.padding).to(pixels.dtype)


class ConvolutionalStem(nn.Sequential):
    """Patch embedding by 3 x 3 convolutions with stride 2; the width doubles from H / 4 up to H.

    Replaces a trunk's linear patch projection. Trained from random weights, it learns shapes in far fewer steps.

    Source: arXiv 2106.14881, with group norm of one group (over each picture by itself) in place of batch norm.

    Args:
        width: H, the size of a patch embedding.
        patch_size: Side of a patch in pixels, a power of 2.

    Raises:
        UserError: The patch size is not a power of 2, or the width is not a multiple of 4.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        if not stem_supports(patch_size, width):
            raise UserError(
                f"model.image.stem convolutions needs a patch_size that is a power of 2, at least 2, and a hidden_size "
                f"that is a multiple of 4: they are {patch_size} and {width}"
            )
        steps = patch_size.bit_length() - 1
        widths = [3, *(min(width >> 2 << step, width) for step in range(steps - 1)), width]
        modules: list[nn.Module] = []
        for in_channels, out_channels in itertools.pairwise(widths):
            convolution = StemConvolution(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
            modules += [convolution, nn.GroupNorm(1, out_channels), nn.GELU()]
        super().__init__(*modules[:-2])  # no norm or activation after the last convolution, like a patch projection

    @property
    def weight(self) -> Tensor:
        """Weight of the first convolution: trunks cast the pixels to its dtype."""
        return self.get_parameter("0.weight")


class ImageEncoder(PartlyFrozen):
    """Encode pictures as one embedding and a sequence of patch features each.

    Args:
        trunk: A model of `architectures.IMAGE` (before transformers 5 its `vision_model`, where it wraps one); its
            layers are called one by one, never its `forward`.
        embed_dim: Size of the embedding.
        train: "none", "all" or the number of top layers that are trained. Frozen parts stay in eval mode.
        head_layers: Transformer layers of the head.
        pool: Input of the projection without head layers: the trunk's "class" token (SigLIP: the result of its
            attention pooling); the "mean" of the patches, which
            trains the patches directly if a trunk starts from random weights; or the concatenated means over the cells
            of a 4 x 4 "grid" (one level of a spatial pyramid), so that the embedding keeps coarse spatial layout.
        head_heads: Attention heads of the head's layers.
        dropout: Dropout of the head.
        freeze_projection: Never train the projection to the embedding; `init_projection` sets it.
        mean: Mean of red, green and blue, subtracted from values in [0, 1].
        std: Standard deviation of red, green and blue, by which the result is divided.
        stem: "patches": the trunk's patch projection; "convolutions": a `ConvolutionalStem` in its place.
    """

    def __init__(
        self,
        trunk: nn.Module,
        embed_dim: int,
        train: str,
        head_layers: int,
        head_heads: int,
        dropout: float,
        pool: str = "class",
        freeze_projection: bool = False,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        stem: str = "patches",
    ) -> None:
        super().__init__()
        self.trunk, self.pool = trunk, pool
        architecture = TRUNKS[self.trunk.config.model_type]
        assert isinstance(architecture, ImageArchitecture)
        self.architecture = architecture
        if stem == "convolutions":
            parent, _, name = architecture.patches.rpartition(".")
            stem_module = ConvolutionalStem(self.token_dim, self.trunk.config.patch_size)
            setattr(self.trunk.get_submodule(parent), name, stem_module)
        self.mean, self.std = mean, std
        layers = self.layers
        trained = trained_layers(train, len(layers), "model.image.train")
        self.frozen_layers = None if trained is None else len(layers) - trained
        self.no_masks = masks_of(layers[0])
        segments = GRID * GRID if pool == "grid" else 1
        self.head = Head(self.token_dim, embed_dim, head_layers, head_heads, dropout, segments)
        if freeze_projection:
            self.head.project = FrozenLinear(self.head.project)
        self.freeze()

    @property
    def token_dim(self) -> int:
        """Size of a patch feature."""
        return self.trunk.config.hidden_size

    @property
    def layers(self) -> nn.ModuleList:
        """The trunk's layers."""
        return self.trunk.get_submodule(self.architecture.layers)

    @property
    def patch_embedding(self) -> nn.Module:
        """The convolution, or the stem, that embeds patches."""
        return self.trunk.get_submodule(self.architecture.patches)

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the trunk's last layer."""
        return self.trunk.get_submodule(self.architecture.final_norm)

    @property
    def image_size(self) -> int:
        """Side in pixels that the trunk's position embeddings are for; they are interpolated for other sizes."""
        return self.trunk.config.image_size

    @torch.no_grad()
    def init_projection(self, weight: Tensor) -> None:
        """Initialize the projection with a trunk's own projection.

        Args:
            weight: [D, H], weight of a projection of the class token without bias.
        """
        self.head.project.weight.copy_(weight)
        self.head.project.bias.zero_()

    def frozen_modules(self) -> Iterator[nn.Module]:
        """Yield the modules that are never trained, from the input up."""
        if self.frozen_layers is None:
            return
        yield from self.inputs_and_layers()[0]
        yield from self.layers[: self.frozen_layers]
        if self._all_frozen:
            yield self.final_norm
            if self.has_pooling:
                yield self.trunk.head

    def inputs_and_layers(self) -> tuple[tuple[nn.Module, ...], nn.ModuleList]:
        """Return the trunk's modules before its layers, and its layers."""
        inputs = [getattr(self.trunk, name) for name in ("embeddings", "pre_layrnorm") if hasattr(self.trunk, name)]
        return tuple(inputs), self.layers

    @property
    def _all_frozen(self) -> bool:
        return self.frozen_layers == len(self.layers)

    @property
    def has_pooling(self) -> bool:
        """Whether the trunk has attention pooling in place of a class token, and it is used."""
        return not self.architecture.class_token and self.trunk.config.vision_use_head

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> Features:
        """Normalize pictures and run the frozen part of the trunk.

        Args:
            images: Uint8 [B, 3, S, S].
        """
        channels = [(images[:, c].float() - 255 * self.mean[c]) / (255 * self.std[c]) for c in range(3)]
        pixels = torch.stack(channels, dim=1)
        if self.frozen_layers is None:
            return Features(pixels, None)
        hidden = self._run_layers(self._embed(pixels), 0, self.frozen_layers)
        if not self._all_frozen:
            return Features(hidden, None)
        hidden = self.final_norm(hidden)
        return Features(hidden, None, (self.trunk.head(hidden),) if self.has_pooling else ())

    def forward(self, features: Features) -> Encoded:
        """Run the trained part of the trunk and the head; tokens are the patches, without the class token.

        Attention pooling that is frozen was computed with the features, and is their only state.
        """
        hidden = features.hidden
        if self.frozen_layers is None:
            hidden = self._embed(hidden)
        hidden = self._run_layers(hidden, self.frozen_layers or 0, len(self.layers))
        if not self._all_frozen:
            hidden = self.final_norm(hidden)
        patches = hidden[:, 1:] if self.architecture.class_token else hidden
        embedding, tokens = self.head(patches, None, self._pool(hidden, patches, features.states))
        return Encoded(embedding, tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))

    def _pool(self, hidden: Tensor, patches: Tensor, pooled: tuple[Tensor, ...]) -> Tensor | None:
        """Pool tokens for a head without layers; None: mean of the patches.

        Args:
            hidden: The trunk's tokens [B, 1 + P, H], or [B, P, H] without a class token.
            patches: The patches among them [B, P, H].
            pooled: Result of a frozen attention pooling [B, H], or nothing.
        """
        if self.pool == "class" and self.architecture.class_token:
            return hidden[:, 0]
        if self.pool == "class" and self.has_pooling:
            return pooled[0] if pooled else self.trunk.head(hidden)
        if self.pool != "grid":
            return None
        side = math.isqrt(patches.shape[1])
        return F.adaptive_avg_pool2d(patches.transpose(1, 2).unflatten(-1, (side, side)), GRID).flatten(1)

    def _embed(self, pixels: Tensor) -> Tensor:
        """Embed pixels [B, 3, S, S] as tokens with positions: [B, 1 + P, H], or [B, P, H] without a class token."""
        resized = pixels.shape[-1] != self.image_size
        more = {"interpolate_pos_encoding": resized} if self.architecture.sized else {}
        hidden = self.trunk.embeddings(pixels, **more)
        return self.trunk.pre_layrnorm(hidden) if hasattr(self.trunk, "pre_layrnorm") else hidden

    def _run_layers(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        for layer in self.layers[start:stop]:
            hidden = run_layer(layer, hidden, *self.no_masks)
        return hidden
