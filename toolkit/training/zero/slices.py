"""What a rank holds of parameters that the ranks share: slices of one, and equal cuts of memory with several in it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slice:
    """Elements `start` to `stop` of a trained parameter laid out flat: what there is of them are its `parts`.

    Attributes:
        name: As in the learner's `named_parameters`.
        start: First element, counted in the whole parameter.
        stop: One past the last.
        shape: Of the whole parameter.
    """

    parts: ClassVar[tuple[str, ...]]

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Cut:
    """This rank's of the equal cuts of one stretch of memory, in which some whole parameters lie one after another.

    Attributes:
        master: float32 [n], what the optimizer updates here. The ranks' cuts behind one another are the stretch, which
            may end in padding; at stage 0 every rank's cut is all of it.
        offsets: Where each parameter, by its name in the learner, begins in the stretch.
    """

    master: Tensor
    offsets: dict[str, int]
