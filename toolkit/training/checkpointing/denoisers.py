"""The denoisers of a run: they are part of its checkpoints only, not of its exports."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from shards.errors import UserError
from toolkit.config.schema import Config
from toolkit.model.retrieval import SpeechImageModel
from toolkit.training.checkpointing.files import CheckpointReader, problem_of
from toolkit.training.checkpointing.progress import read_marker
from toolkit.training.learner import Learner
from toolkit.training.zero.fragments import Fragment


@dataclass(frozen=True, eq=False)
class _Weights(Fragment):
    """A complete weight."""

    parts: ClassVar[tuple[str, ...]] = ("master",)

    master: Tensor


def load_denoisers(run: Path, config: Config, model: SpeechImageModel, step: int | None) -> dict[str, nn.Module]:
    """Load the denoisers that were trained with an exported model.

    Returns:
        Denoisers with float32 weights in evaluation mode, on the CPU, by the modality that they reconstruct.

    Raises:
        UserError: The run trained none, it has no checkpoint of this step, or the checkpoint is damaged.
    """
    if not config.objectives.denoising.weight:
        raise UserError("the run trained no denoiser (objectives.denoising.weight 0)")
    folder = run / "checkpoints" / f"step-{step or 0:08d}"
    marker = read_marker(folder)
    if isinstance(marker, str):
        raise UserError(f"exports have no denoiser, and {folder} cannot be used: {marker}")
    files = [info for info in marker.files if info.name.startswith("fragments-")]
    for info in files:
        if problem := problem_of(folder, info):
            raise UserError(f"{folder} cannot be used: {problem}")
    learner = Learner(model, config.objectives, 0, 1)
    denoisers = learner.denoisers.float().requires_grad_(False).eval()
    reader = CheckpointReader(folder / info.name for info in files)
    for name, parameter in denoisers.named_parameters():
        weights = _Weights(f"denoisers.{name}", 0, parameter.numel(), tuple(parameter.shape), parameter.view(-1))
        reader.check(weights)
        reader.read_into(weights)
    return dict(denoisers.items())
