r"""The momentum encoder: a slow average of the student that supplies keys, soft targets and clean features.

.. math:: w_t \leftarrow m \, w_t + (1 - m) \, w_s

bfloat16 has 8 significant bits, so an update of half a per cent would be lost in it, and so would most of a step's
change of the student's weights. The average is kept in float32 and follows the float32 weights of the optimizer, where
those are: each rank averages its partition, and the partitions are gathered in the model's precision for the forward
pass.

The momentum encoder is the teacher of the objectives. Its float32 weights, of which a rank has its partition, are
called the average; those in the model's precision, complete on each rank, the working copy.

Bytes per trained weight of the encoders on each of N ranks, in addition to the optimizer's:

    stage    average    working copy, for the forward pass
    0        4          2 in bf16; in fp32 the average itself is used
    1 to 3   4 / N      2 in bf16, 4 in fp32: complete on each rank, under ZeRO 3 too
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from toolkit.distributed import begin_all_gather
from toolkit.model.outputs import Encoded, Features
from toolkit.model.retrieval import SpeechImageModel, build_teacher
from toolkit.training.zero.fragments import Fragment, Partition


@dataclass(frozen=True, eq=False)
class AverageFragment(Fragment):
    """A fragment of the average.

    Attributes:
        average: float32 [stop - start], a view that may be written to.
    """

    parts: ClassVar[tuple[str, ...]] = ("average",)

    average: Tensor


class MomentumEncoder:
    """The momentum encoder, or teacher. Frozen weights are shared with the student, their features computed once.

    Attributes:
        decay: m.
        encoder: Both encoders, with the working copy of the average.
        student: The trained parameters of the student's encoders.
        working_copy: The teacher's parameters, in the same order, in the model's precision.
        average: This rank's partition of the average, float32; without an engine one flat tensor a parameter.
    """

    def __init__(self, student: SpeechImageModel, decay: float) -> None:
        """Copy the student's encoders.

        Args:
            student: The model, before DeepSpeed shards or casts it.
            decay: m, in [0, 1).
        """
        self.decay = decay
        self.encoder = build_teacher(student)
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad and is_averaged(name)}
        copies = dict(self.encoder.named_parameters())
        self.names, self.student = list(trained), list(trained.values())
        self.working_copy = [copies[name] for name in self.names]
        self._pending: tuple[Tensor, Tensor, Any] | None = None  # sent, received, handle
        self._set_storage(self._own_partitions(), [w.detach().float().view(-1) for w in self.working_copy], 0, 1)

    @torch.no_grad()
    def __call__(self, speech: tuple[Features, ...], image: Features) -> tuple[Encoded, Encoded]:
        """Encode the features of the frozen trunks, without gradient."""
        self.wait_pending()
        return self.encoder.encode(speech, image)

    def to(self, device: torch.device, dtype: torch.dtype) -> "MomentumEncoder":
        """Move to a device; the working copy takes `dtype`, the average stays float32."""
        self._move(device, dtype)
        self._set_storage(self._own_partitions(), [average.to(device) for average in self.average], 0, 1)
        return self

    def attach(self, engine: Any, rank: int, world_size: int) -> "MomentumEncoder":
        """Start at the float32 weights of an engine's optimizer, and average them where they are stored.

        Args:
            engine: DeepSpeed engine of a module that contains the student; every rank calls this.
            rank: This process.
            world_size: Number of processes.
        """
        from toolkit.training.zero.state import partitions  # imports DeepSpeed, which is not needed without an engine

        self._move(engine.device, next(engine.module.parameters()).dtype)
        numbers = {id(parameter): number for number, parameter in enumerate(self.student)}
        self.names = [""] * len(self.student)
        for name, parameter in engine.module.named_parameters():
            if (number := numbers.get(id(parameter))) is not None:
                self.names[number] = name
        own_partitions = [each for each in partitions(engine) if not each.offsets.keys().isdisjoint(self.names)]
        where = (rank, world_size) if engine.zero_optimization_stage() else (0, 1)
        with torch.no_grad():
            self._set_storage(own_partitions, [each.master.float().clone() for each in own_partitions], *where)
        return self

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        """Move the average towards the student's current weights, and start to update the working copy.

        The next forward pass waits for the working copy.

        Args:
            decay: m of this update only; 0 copies the student's weights.
        """
        decay = self.decay if decay is None else decay
        self.wait_pending()
        masters = [each.master.float() for each in self._partitions]
        torch._foreach_lerp_(self.average, masters, 1.0 - decay)
        self._refresh()

    @torch.no_grad()
    def wait_pending(self) -> None:
        """Wait for a pending update of the working copy."""
        if self._pending is None:
            return
        (_, gathered, work), self._pending = self._pending, None
        work.wait()
        for complete, parts in zip(self._gathered, gathered.split(self._sizes, dim=1), strict=True):
            complete.copy_(parts)

    def local_fragments(self) -> list[AverageFragment]:
        """List this rank's fragments of the average; at stage 0 every rank has all of them."""
        shapes = dict(zip(self.names, self._shapes, strict=True))
        fragments = []
        for partition, average in zip(self._partitions, self.average, strict=True):
            first = self._rank * len(average)
            for name, offset in partition.offsets.items():
                if name in shapes:
                    start = max(first - offset, 0)
                    stop = min(first + len(average) - offset, math.prod(shapes[name]))
                    if start < stop:
                        view = average[offset + start - first : offset + stop - first]
                        fragments.append(AverageFragment(name, start, stop, shapes[name], view))
        return fragments

    @contextlib.contextmanager
    def editable(self) -> Iterator[list[AverageFragment]]:
        """Let the caller overwrite this rank's fragments, then update the working copy; every rank calls this."""
        with torch.no_grad():
            self.wait_pending()
            yield self.local_fragments()
            self._refresh()
            self.wait_pending()

    def _own_partitions(self) -> list[Partition]:
        """Return the student's complete parameters as partitions, for use without an engine."""
        return [Partition(p.detach().view(-1), {name: 0}) for name, p in zip(self.names, self.student, strict=True)]

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        self.encoder.to(device)  # type: ignore[arg-type]  # its decorator hides the signature
        for working in self.working_copy:
            working.data = working.data.to(dtype)

    def _set_storage(self, partitions: list[Partition], averages: list[Tensor], rank: int, world_size: int) -> None:
        """Set up the average and, as `world_size` rows of such partitions, the teacher's working copy.

        Args:
            partitions: This rank's partitions.
            averages: float32, the average of each partition; not copied.
            rank: This process's position among the equal partitions.
            world_size: Number of equal partitions.
        """
        self._partitions, self.average, self._rank, self._world_size = partitions, averages, rank, world_size
        self._shapes = [tuple(working.shape) for working in self.working_copy]
        self._sizes = [len(average) for average in averages]
        offset_of = {name: (n, offset) for n, each in enumerate(partitions) for name, offset in each.offsets.items()}
        self._gathered = [
            average.view(1, -1)
            if world_size == 1
            and (average.dtype, average.device) == (self.working_copy[0].dtype, self.working_copy[0].device)
            else self.working_copy[0].new_empty(world_size, len(average))
            for average in averages
        ]
        for name, working, shape in zip(self.names, self.working_copy, self._shapes, strict=True):
            number, offset = offset_of[name]
            working.data = self._gathered[number].view(-1)[offset : offset + math.prod(shape)].view(shape)
        with torch.no_grad():
            self._refresh()
            self.wait_pending()

    def _refresh(self) -> None:
        """Update the working copy: at once if this rank has the complete average, else start to gather it."""
        if self._world_size == 1:
            pairs = zip(self._gathered, self.average, strict=True)
            stale = [(copy.view(-1), average) for copy, average in pairs if copy.data_ptr() != average.data_ptr()]
            if stale:
                torch._foreach_copy_([copy for copy, _ in stale], [average for _, average in stale])
        elif self._gathered:
            row = self._gathered[0].new_empty(1, sum(self._sizes))
            torch._foreach_copy_(list(row.view(-1).split(self._sizes)), self.average)
            self._pending = (row, *begin_all_gather(row, self._world_size))


def is_averaged(name: str) -> bool:
    """Return whether the teacher averages a trained parameter, by its name in the model or in the learner."""
    return name.removeprefix("model.").startswith(("speech.", "image."))
