"""Image encoder: CLIP or BLIP-2 vision trunk, with its patch projection or a convolutional stem, and head."""

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import UserError
from toolkit.model.layers import FrozenLinear, Head
from toolkit.model.outputs import Encoded, Features
from toolkit.model.trunk import PartlyFrozen, run_layer, trained_layers

# Of OpenAI's CLIP; BLIP-2 uses the same.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
GRID = 4  # cells a side that the patches are pooled in


class ConvolutionalStem(nn.Sequential):
    """Patch embedding by convolutions of 3 x 3 with stride 2; the width doubles from a quarter of H up to H.

    In place of a trunk's linear projection of patches; from random weights it finds shapes much sooner.

    Source: arXiv 2106.14881, with group norm of one group (over each picture by itself) in place of batch norm.

    Args:
        width: H, of a patch embedding.
        patch_size: pixels a side, a power of 2.

    Raises:
        UserError: the patch size is no power of 2, or the width is too small for it.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        steps = patch_size.bit_length() - 1
        if steps < 1 or patch_size != 2**steps or width % 4:
            raise UserError(
                f"model.image.stem convolutions needs a patch_size that is a power of 2, at least 2, and a hidden_size "
                f"that is a multiple of 4: they are {patch_size} and {width}"
            )
        widths = [3, *(min(width >> 2 << step, width) for step in range(steps - 1)), width]
        modules: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            convolution = nn.Conv2d(narrow, wide, kernel_size=3, stride=2, padding=1, bias=False)
            modules += [convolution, nn.GroupNorm(1, wide), nn.GELU()]
        super().__init__(*modules[:-2])  # no norm or activation after the last: the projection has none

    @property
    def weight(self) -> Tensor:
        """Weight of the first convolution: trunks cast the pixels to its dtype."""
        return self.get_parameter("0.weight")

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed pixels [B, 3, S, S]: [B, H, S / patch_size, S / patch_size].

        Raises:
            UserError: bfloat16 on a CPU, where narrow convolutions can be computed wrongly.
        """
        if pixels.dtype == torch.bfloat16 and pixels.device.type == "cpu":
            raise UserError("--model.image.stem convolutions cannot be computed in bf16 on CPUs: take fp32")
        return super().forward(pixels)


class ImageEncoder(PartlyFrozen):
    """Encode pictures as one embedding and a sequence of patches each.

    Args:
        trunk: CLIPVisionModel (before transformers 5: its `vision_model`) or Blip2VisionModel; its layers are called
            one by one, never its `forward`.
        embed_dim: length of the embedding.
        train: "none", "all" or the number of top layers that are trained. Whatever is frozen stays in eval mode.
        head_layers: transformer layers of the head.
        pool: what a head without layers projects: the trunk's "class" token; the "mean" of the patches, which
            trains the patches directly when a trunk starts from random weights; or the means over the cells of a 4 x 4
            "grid", side by side (a spatial pyramid's level), so that the embedding can say what is where from the start.
        head_heads: their attention heads.
        dropout: of the head.
        freeze_projection: what projects the embedding is never trained; it is to be set by `init_projection`.
        mean: of red, green and blue, subtracted from values in [0, 1] before the trunk sees them.
        std: what they are divided by then.
        stem: "patches": the trunk's own projection of patches; "convolutions": a `ConvolutionalStem` in its place.
    """

    trunk: Any

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
        if stem == "convolutions":
            self.trunk.embeddings.patch_embedding = ConvolutionalStem(self.token_dim, self.trunk.config.patch_size)
        self.mean, self.std = mean, std
        layers = self.trunk.encoder.layers
        trained = trained_layers(train, len(layers), "model.image.train")
        self.frozen_layers = None if trained is None else len(layers) - trained
        # Attention masks that a layer's signature asks for and that pictures have no use for.
        parameters = inspect.signature(layers[0].forward).parameters.values()
        required = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
        self.no_masks = (None,) * (len(required) - 1)
        places = GRID * GRID if pool == "grid" else 1
        self.head = Head(self.token_dim, embed_dim, head_layers, head_heads, dropout, places)
        if freeze_projection:
            self.head.project = FrozenLinear(self.head.project)
        self.freeze()

    @property
    def token_dim(self) -> int:
        """Size of a patch feature."""
        return self.trunk.config.hidden_size

    @property
    def image_size(self) -> int:
        """Pixels a side that the trunk's positions are made for; at another size they are interpolated."""
        return self.trunk.config.image_size

    @torch.no_grad()
    def init_projection(self, weight: Tensor) -> None:
        """Let the embedding begin as a trunk's own embedding.

        Args:
            weight: [D, H], of a projection of the class token, without bias.
        """
        self.head.project.weight.copy_(weight)
        self.head.project.bias.zero_()

    def frozen_modules(self) -> Iterator[nn.Module]:
        """The modules that are never trained, from the input up."""
        if self.frozen_layers is None:
            return
        yield self.trunk.embeddings
        if hasattr(self.trunk, "pre_layrnorm"):
            yield self.trunk.pre_layrnorm
        yield from self.trunk.encoder.layers[: self.frozen_layers]
        if self._all_frozen:
            yield self.trunk.post_layernorm

    @property
    def _all_frozen(self) -> bool:
        return self.frozen_layers == len(self.trunk.encoder.layers)

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> Features:
        """Normalise the pictures and run the frozen part of the trunk.

        Args:
            images: uint8 [B, 3, S, S].
        """
        channels = [(images[:, c].float() - 255 * self.mean[c]) / (255 * self.std[c]) for c in range(3)]
        pixels = torch.stack(channels, dim=1)
        if self.frozen_layers is None:
            return Features(pixels, None)
        hidden = self._run_layers(self._embed(pixels), 0, self.frozen_layers)
        return Features(self.trunk.post_layernorm(hidden) if self._all_frozen else hidden, None)

    def forward(self, features: Features) -> Encoded:
        """Run the rest of the trunk and the head; tokens are the patches, without the class token."""
        hidden = features.hidden
        if self.frozen_layers is None:
            hidden = self._embed(hidden)
        hidden = self._run_layers(hidden, self.frozen_layers or 0, len(self.trunk.encoder.layers))
        if not self._all_frozen:
            hidden = self.trunk.post_layernorm(hidden)
        embedding, tokens = self.head(hidden[:, 1:], None, self._summary(hidden))
        return Encoded(embedding, tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))

    def _summary(self, hidden: Tensor) -> Tensor | None:
        """What a head without layers projects, of the class token and the patches [B, 1 + P, H]; None: their mean."""
        if self.pool == "class":
            return hidden[:, 0]
        if self.pool == "mean":
            return None
        side = math.isqrt(hidden.shape[1] - 1)
        return F.adaptive_avg_pool2d(hidden[:, 1:].transpose(1, 2).unflatten(-1, (side, side)), GRID).flatten(1)

    def _embed(self, pixels: Tensor) -> Tensor:
        """Class token and patches with their positions, [B, 1 + P, H], of pixels [B, 3, S, S]."""
        resized = pixels.shape[-1] != self.image_size
        hidden = self.trunk.embeddings(pixels, interpolate_pos_encoding=resized)
        return self.trunk.pre_layrnorm(hidden) if hasattr(self.trunk, "pre_layrnorm") else hidden

    def _run_layers(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        for layer in self.trunk.encoder.layers[start:stop]:
            hidden = run_layer(layer, hidden, *self.no_masks)
        return hidden
