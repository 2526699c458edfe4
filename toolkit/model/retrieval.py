"""The retrieval model: both encoders, the fusion encoder and its matching head, as a transformers model."""

import copy
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    HubertConfig,
    HubertModel,
    PretrainedConfig,
    PreTrainedModel,
)

from shards.errors import UserError
from toolkit.model.fusion import FusionEncoder
from toolkit.model.image import ImageEncoder
from toolkit.model.outputs import Encoded, Features
from toolkit.model.speech import SpeechEncoder
from toolkit.model.trunk import Kind, quiet, read_weights

SAVED = Kind("a trained model of this toolkit", "model", ("speech_image",))
VISION = {"clip": (CLIPVisionConfig, CLIPVisionModel), "blip2": (Blip2VisionConfig, Blip2VisionModel)}


class SpeechImageConfig(PretrainedConfig):
    """The whole architecture, trunks included: a saved model needs no other folder.

    Attributes:
        embed_dim: length of the global embeddings.
        speech: HubertConfig values under "trunk"; train, head_layers, head_heads, dropout.
        image: architecture ("clip" or "blip2"); the values of its vision configuration under "trunk"; the rest as for
            speech.
        fusion: width, layers, heads, pool, dropout.
        contrastive: initial, minimum and maximum temperature, and whether it is learned.
        match_weight: weight of the match logit beside the cosine in re-ranking, fitted on dev; None: not fitted.
    """

    model_type = "speech_image"

    def __init__(
        self,
        embed_dim: int = 256,
        speech: dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
        fusion: dict[str, Any] | None = None,
        contrastive: dict[str, Any] | None = None,
        match_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.embed_dim = embed_dim
        self.speech = speech or {}
        self.image = image or {}
        self.fusion = fusion or {}
        self.contrastive = contrastive or {}
        self.match_weight = match_weight
        super().__init__(**kwargs)


class Temperature(nn.Module):
    """Temperature of the contrastive softmax, learned as its logarithm and clamped (ALBEF: 0.001 to 0.5).

    Attributes:
        exact: float32 [1], the logarithm to compute with where the parameter is in less precision; None: the parameter.
    """

    def __init__(
        self, initial: float = 0.07, minimum: float = 0.001, maximum: float = 0.5, learned: bool = True
    ) -> None:
        super().__init__()
        self.minimum, self.maximum, self.learned = minimum, maximum, learned
        self.initial_log = math.log(initial)
        self.log_temperature = nn.Parameter(torch.tensor([self.initial_log]), requires_grad=learned)
        self.exact: Tensor | None = None

    def forward(self) -> Tensor:
        """The temperature, a float32 scalar.

        At a bound it takes no gradient that would push it further out, so that it does not drift off while it is
        clamped; one that brings it back passes.
        """
        log = self.log_temperature.float().clone()
        value = (log if self.exact is None else self.exact).detach().exp()
        low, high = value <= self.minimum, value >= self.maximum
        if log.requires_grad:  # descent moves against the gradient
            log.register_hook(lambda grad: grad.masked_fill((low & (grad > 0)) | (high & (grad < 0)), 0))
        log = log if self.exact is None else self.exact + (log - log.detach())
        clamped = value.clamp(self.minimum, self.maximum)
        return (clamped * (log - log.detach()).exp()).squeeze(0)


class SpeechImageModel(PreTrainedModel):
    """Speech-image retrieval: coarse by the embeddings' dot product, fine by `match`.

    Args:
        config: the architecture.
        speech_trunk: a HuBERT to build on; None: random weights.
        image_trunk: a vision trunk to build on; None: random weights.
    """

    config_class = SpeechImageConfig
    base_model_prefix = ""
    main_input_name = "waveforms"

    def __init__(
        self,
        config: SpeechImageConfig,
        speech_trunk: HubertModel | None = None,
        image_trunk: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        speech, image = dict(config.speech), dict(config.image)
        hubert_config = HubertConfig(**speech.pop("trunk", {}))
        vision_config_class, vision_class = VISION[image.pop("architecture", "clip")]
        vision_config = vision_config_class(**image.pop("trunk", {}))
        hubert = speech_trunk or HubertModel(hubert_config)
        vision = image_trunk or vision_class(vision_config)
        self.speech = SpeechEncoder(hubert, config.embed_dim, **speech)
        # Before transformers 5 a CLIPVisionModel is a shell around its `vision_model`.
        self.image = ImageEncoder(getattr(vision, "vision_model", vision), config.embed_dim, **image)
        fusion = dict(config.fusion)
        if fusion.pop("agreement", False):
            raise UserError(
                "this model's match score reads the global embeddings (fusion.agreement), which it can only repeat: "
                "train it anew, or evaluate it with the version that wrote it"
            )
        self.fusion = FusionEncoder(self.speech.token_dim, self.image.token_dim, **fusion)
        self.match_head = nn.Linear(self.fusion.width, 2)
        self.temperature = Temperature(**config.contrastive)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave every weight as its module's constructor made it or as it was loaded."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "SpeechImageModel":  # type: ignore[override]
        """Read what `save_pretrained` wrote, in eval mode.

        Args:
            source: folder or hub id.
            options: of transformers' `from_pretrained`, such as `dtype`.

        Raises:
            UserError: nothing there, or not all the model's weights.
        """
        model = read_weights(super().from_pretrained, source, SAVED, **options)
        model.freeze()  # transformers 5 makes new parameters while it loads
        return model

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:  # type: ignore[override]
        """Write `config.json` and `model.safetensors`: all that `from_pretrained` needs, readable as the umask says."""
        with quiet():
            super().save_pretrained(folder, **options)
        for weights in Path(folder).glob("*.safetensors"):  # safetensors writes them for the user alone
            shutil.copymode(Path(folder) / "config.json", weights)

    def freeze(self) -> None:
        """Take what the configuration freezes out of training."""
        self.speech.freeze()
        self.image.freeze()
        self.temperature.log_temperature.requires_grad_(self.temperature.learned)

    def frozen_features(
        self, images: Tensor, waveforms: Tensor, lengths: Tensor, host_lengths: Sequence[int] | None = None
    ) -> tuple[tuple[Features, ...], Features]:
        """Run the frozen parts of both trunks, without gradient.

        Args:
            images: uint8 [B, 3, S, S].
            waveforms: [B, T] in [-1, 1], 16 kHz, zero-padded.
            lengths: int64 [B], samples.
            host_lengths: the same as numbers: with them utterances are encoded in groups of like length.

        Returns:
            Speech features, a group each; image features.
        """
        return self.speech.frozen_features(waveforms, lengths, host_lengths), self.image.frozen_features(images)

    def encode(self, speech: tuple[Features, ...], image: Features) -> tuple[Encoded, Encoded]:
        """Encode what `frozen` made: speech, image."""
        return self.speech(speech), self.image(image)

    def encode_speech(self, waveforms: Tensor, lengths: Tensor) -> Encoded:
        """Encode waveforms [B, T] of `lengths` int64 [B] samples."""
        return self.speech(self.speech.frozen_features(waveforms, lengths))

    def encode_image(self, images: Tensor) -> Encoded:
        """Encode images uint8 [B, 3, S, S]."""
        return self.image(self.image.frozen_features(images))

    def match(self, speech: Encoded, image: Encoded) -> Tensor:
        """Logits [B, 2], float32, of whether utterance and picture of a row belong together (index 1: they do).

        They are a function of the tokens alone: what the global embeddings tell is SIC's part.
        """
        fused = self.fusion(speech.tokens, speech.mask, image.tokens)
        return self.match_head(fused[:, 0]).float()

    def forward(self, images: Tensor, waveforms: Tensor, lengths: Tensor) -> tuple[Encoded, Encoded]:
        """Encode utterances and pictures: speech, image."""
        return self.encode(*self.frozen_features(images, waveforms, lengths))


def build_teacher(model: SpeechImageModel) -> SpeechImageModel:
    """A copy of the encoders, to be moved by a moving average: eval mode, no gradients.

    What is frozen in the model is shared with it, not copied; what is trained starts equal. The fusion encoder, which
    no average is taken of, is left out.
    """
    shared: list[Tensor] = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for module in model.modules():
        if not any(parameter.requires_grad for parameter in module.parameters()):
            shared += module.buffers(recurse=False)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    memo |= {id(part): nn.Identity() for part in (model.fusion, model.match_head)}
    return copy.deepcopy(model, memo).eval().requires_grad_(False)
