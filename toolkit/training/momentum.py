"""The momentum encoder: a slow average of the student that supplies keys, soft targets and clean features."""

import torch
from torch import Tensor

from toolkit.model.encoded import Encoded, Features
from toolkit.model.retrieval import SpeechImageModel, teacher_of


class MomentumEncoder:
    """Teacher whose weights are w_t = m w_t + (1 - m) w_s, exact under bf16.

    A bf16 number keeps 8 bits, so an update of half a per cent would be lost in it. The average is therefore kept in
    float32 beside the copy in the model's precision that the forward pass uses; in float32 the two are one. Frozen
    weights are the student's own, neither copied nor run a second time.
    """

    def __init__(self, student: SpeechImageModel, decay: float) -> None:
        """Copy the student's encoders.

        Args:
            student: The model, before DeepSpeed shards or casts it.
            decay: m, in [0, 1).
        """
        self.decay = decay
        self.encoder = teacher_of(student)
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad and _in_encoder(name)}
        self.names = list(trained)
        self.student = list(trained.values())
        copies = dict(self.encoder.named_parameters())
        self.working = [copies[name] for name in self.names]
        self.average = [p.detach().float() for p in self.working]

    @torch.no_grad()
    def __call__(self, speech: tuple[Features, ...], image: Features) -> tuple[Encoded, Encoded]:
        """Encode what the frozen trunks gave, without gradient."""
        return self.encoder.encode(speech, image)

    def to(self, device: torch.device, dtype: torch.dtype) -> "MomentumEncoder":
        """Move to a device; the working copy takes `dtype`, the average stays float32."""
        self.encoder.to(device)  # type: ignore[arg-type]  # its decorator hides the signature
        self.average = [a.to(device) for a in self.average]
        for working, average in zip(self.working, self.average, strict=True):
            working.data = average if dtype == torch.float32 else average.to(dtype)
        return self

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the student's present weights; they must be whole (gathered under ZeRO-3)."""
        weights: list[Tensor] = [p.detach().float() for p in self.student]
        torch._foreach_lerp_(self.average, weights, 1.0 - self.decay)
        self._refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by parameter name, float32."""
        return dict(zip(self.names, self.average, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved average."""
        for average, name in zip(self.average, self.names, strict=True):
            average.copy_(state[name])
        self._refresh()

    def _refresh(self) -> None:
        if self.working and self.working[0].dtype != torch.float32:
            torch._foreach_copy_([w.data for w in self.working], self.average)


def _in_encoder(name: str) -> bool:
    return name.startswith(("speech.", "image."))
