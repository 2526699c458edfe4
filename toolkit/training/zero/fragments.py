"""A rank's part of the state, in DeepSpeed's terms: partitions of flat buffers, and fragments of parameters."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements `start` to `stop` of a flattened trained parameter; subclasses hold tensors of them, as in `parts`."""

    parts: ClassVar[tuple[str, ...]]

    name: str  # in the learner's `named_parameters`
    start: int
    stop: int
    shape: tuple[int, ...]  # of the complete parameter


@dataclass(frozen=True, eq=False)
class Partition:
    """This rank's partition of a flat buffer of complete parameters, which is divided equally among the ranks.

    The ranks' partitions concatenated are the buffer, which may end in padding; at stage 0 every rank's is all of it.
    """

    master: Tensor  # float32 [n], the weights that the optimizer updates
    offsets: dict[str, int]  # of each parameter in the buffer, by its name in the learner
