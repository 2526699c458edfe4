"""A rank's partition of the parameters: slices of one parameter, and equal cuts of memory with several parameters."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slice:
    """Elements `start` to `stop` of a flattened trained parameter; subclasses have tensors of them, named in `parts`.

    Attributes:
        name: Name in the learner's `named_parameters`.
        start: First element in the complete parameter.
        stop: One past the last element.
        shape: Shape of the complete parameter.
    """

    parts: ClassVar[tuple[str, ...]]

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Cut:
    """This rank's part of a contiguous memory of complete parameters that is cut equally among the ranks.

    Attributes:
        master: float32 [n], the weights that the optimizer updates. The ranks' cuts concatenated are the memory, which
            may end in padding; at stage 0 every rank's cut is all of it.
        offsets: Offset of each parameter in the memory, by its name in the learner.
    """

    master: Tensor
    offsets: dict[str, int]
