"""The retrieval model as a transformers model: both encoders, the fusion encoder and its matching head."""

import copy
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from shards.errors import UserError
from toolkit.model.architectures import IMAGE, SPEECH, lookup
from toolkit.model.fusion import FusionEncoder
from toolkit.model.image import ImageEncoder
from toolkit.model.lora import merged
from toolkit.model.outputs import Encoded, Features
from toolkit.model.speech import SpeechEncoder
from toolkit.model.trunk import ModelKind, quiet, read_weights

SAVED = ModelKind("a trained model of this toolkit", "model", ("speech_image",))


class SpeechImageConfig(PretrainedConfig):
    """Complete architecture including the trunks: a saved model is self-contained.

    Attributes:
        embed_dim: Size of the embeddings.
        speech: Arguments of `SpeechEncoder`, with the architecture (default: "hubert"), and values of its configuration
            under "trunk".
        image: Arguments of `ImageEncoder`, with the architecture (default: "clip"), and values of its vision
            configuration under "trunk".
        fusion: Arguments of `FusionEncoder`.
        contrastive: Arguments of `Temperature`.
        match_weight: Weight of the match logit relative to the cosine in re-ranking; None: not fitted.
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
    """Temperature of the contrastive softmax, parametrized by its logarithm and clamped (ALBEF: 0.001 to 0.5).

    Attributes:
        exact: Float32 [1], value of the logarithm if the parameter has a lower precision; None: that of the parameter.
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
        """Return the temperature, a float32 scalar.

        At a bound, gradients that would push the parameter further out are zeroed, so that it does not drift away while
        it is clamped; gradients that bring it back pass.
        """
        log = self.log_temperature.float().clone()
        value = (log if self.exact is None else self.exact).detach().exp()
        low, high = value <= self.minimum, value >= self.maximum
        if log.requires_grad:  # gradient descent moves against the gradient
            log.register_hook(lambda grad: grad.masked_fill((low & (grad > 0)) | (high & (grad < 0)), 0))
        log = log if self.exact is None else self.exact + (log - log.detach())
        clamped = value.clamp(self.minimum, self.maximum)
        return (clamped * (log - log.detach()).exp()).squeeze(0)


class SpeechImageModel(PreTrainedModel):
    """Speech-image retrieval model: coarse scores by the dot product of the embeddings, fine scores by `match`.

    Args:
        config: The architecture.
        speech_trunk: A speech trunk; None: random weights.
        image_trunk: A vision trunk; None: random weights.
    """

    config_class = SpeechImageConfig
    base_model_prefix = ""
    main_input_name = "waveforms"

    def __init__(
        self,
        config: SpeechImageConfig,
        speech_trunk: PreTrainedModel | None = None,
        image_trunk: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        speech, image = dict(config.speech), dict(config.image)
        speech_entry = lookup(SPEECH, speech.pop("architecture", "hubert"), "speech.architecture")
        image_entry = lookup(IMAGE, image.pop("architecture", "clip"), "image.architecture")
        speech_config = speech_entry.config(**speech.pop("trunk", {}))
        vision_config = image_entry.config(**image.pop("trunk", {}))
        speech_trunk = speech_trunk or speech_entry.model(speech_config)
        vision = image_trunk or image_entry.model(vision_config)
        self.speech = SpeechEncoder(speech_trunk, config.embed_dim, **speech)
        # Before transformers 5, a CLIPVisionModel wraps its `vision_model`, and so does a SiglipVisionModel.
        self.image = ImageEncoder(getattr(vision, "vision_model", vision), config.embed_dim, **image)
        fusion = dict(config.fusion)
        if fusion.pop("agreement", False):
            raise UserError(
                "this model's match logit depends on the embeddings (fusion.agreement), which is no longer supported: "
                "retrain it, or evaluate it with the version that wrote it"
            )
        self.fusion = FusionEncoder(self.speech.token_dim, self.image.token_dim, **fusion)
        self.match_head = nn.Linear(self.fusion.width, 2)
        self.temperature = Temperature(**config.contrastive)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep every weight as initialized by its module or as loaded."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "SpeechImageModel":  # type: ignore[override]
        """Load a model written by `save_pretrained`, in eval mode.

        Args:
            source: Folder or hub id.
            options: Passed to transformers' `from_pretrained`, such as `dtype`.

        Raises:
            UserError: The source does not exist or lacks weights of the model.
        """
        model = read_weights(super().from_pretrained, source, SAVED, **options)
        model.freeze()  # transformers 5 creates new parameters during loading
        return model

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:  # type: ignore[override]
        """Write `config.json` and `model.safetensors`, with the permissions of the umask; LoRA is merged."""
        if self.speech.lora or self.image.lora:
            options["state_dict"] = merged(self, options.get("state_dict") or self.state_dict())
        with quiet():
            super().save_pretrained(folder, **options)
        for weights in Path(folder).glob("*.safetensors"):  # safetensors creates files that only the user can read
            shutil.copymode(Path(folder) / "config.json", weights)

    def freeze(self) -> None:
        """Disable training of the parts that the configuration freezes."""
        self.speech.freeze()
        self.image.freeze()
        self.temperature.log_temperature.requires_grad_(self.temperature.learned)

    def frozen_features(
        self, images: Tensor, waveforms: Tensor, lengths: Tensor, host_lengths: Sequence[int] | None = None
    ) -> tuple[tuple[Features, ...], Features]:
        """Run the frozen parts of both trunks, without gradient.

        Args:
            images: Uint8 [B, 3, S, S].
            waveforms: [B, T] in [-1, 1], 16 kHz, zero-padded.
            lengths: Int64 [B], in samples.
            host_lengths: The lengths as ints, to encode utterances in groups of similar length; None: one group.

        Returns:
            Speech features of each group; image features.
        """
        return self.speech.frozen_features(waveforms, lengths, host_lengths), self.image.frozen_features(images)

    def encode(self, speech: tuple[Features, ...], image: Features) -> tuple[Encoded, Encoded]:
        """Encode the output of `frozen_features`: speech, image."""
        return self.speech(speech), self.image(image)

    def encode_speech(self, waveforms: Tensor, lengths: Tensor) -> Encoded:
        """Encode waveforms [B, T] of `lengths` int64 [B] samples."""
        return self.speech(self.speech.frozen_features(waveforms, lengths))

    def encode_image(self, images: Tensor) -> Encoded:
        """Encode images uint8 [B, 3, S, S]."""
        return self.image(self.image.frozen_features(images))

    def get_audio_features(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Embed waveforms [B, T] of `lengths` int64 [B] samples: float32 [B, D], of unit length."""
        return self.encode_speech(waveforms, lengths).embedding

    def get_image_features(self, images: Tensor) -> Tensor:
        """Embed images uint8 [B, 3, S, S]: float32 [B, D], of unit length."""
        return self.encode_image(images).embedding

    def match(self, speech: Encoded, image: Encoded) -> Tensor:
        """Compute logits [B, 2], float32, of whether the utterance and picture of each row match (index 1: match).

        They depend on the tokens only, not on the embeddings, which SIC compares.
        """
        fused = self.fusion(speech.tokens, speech.mask, image.tokens)
        return self.match_head(fused[:, 0]).float()

    def forward(self, images: Tensor, waveforms: Tensor, lengths: Tensor) -> tuple[Encoded, Encoded]:
        """Encode utterances and pictures: speech, image."""
        return self.encode(*self.frozen_features(images, waveforms, lengths))


def build_teacher(model: SpeechImageModel) -> SpeechImageModel:
    """Copy the encoders as the teacher of an exponential moving average, in eval mode and without gradients.

    Frozen parts are shared with the model, trained parts are copied. Frozen modules that the teacher calls, as under
    LoRA, are shared as modules, because ZeRO-3 gathers their weights by hooks on them. The fusion encoder, which has no
    teacher, is left out.
    """
    shared: list[Tensor] = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for module in model.modules():
        if not any(parameter.requires_grad for parameter in module.parameters()):
            shared += module.buffers(recurse=False)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    memo |= {id(part): nn.Identity() for part in (model.fusion, model.match_head)}
    memo |= {id(part): part for encoder in (model.speech, model.image) for part in encoder.shared_modules()}
    return copy.deepcopy(model, memo).eval().requires_grad_(False)
