"""Groups of utterances of similar length, which reduce the padding that is encoded.

All utterances of a group are padded to its longest. The optimal groups are contiguous in the utterances sorted by
length, and their boundaries are computed by dynamic programming: the minimal padded length of the first j utterances in
g groups follows from that of fewer utterances in g - 1 groups.

The number of groups is the same on all ranks, even where fewer would be as good: under ZeRO-3, each forward pass of the
encoder's layers is a fixed number of collectives.
"""

from collections.abc import Sequence

import numpy as np

_MAX_EDGES = 512  # possible group boundaries; the time is quadratic in their number


def group_by_length(lengths: Sequence[float] | np.ndarray, groups: int) -> list[np.ndarray]:
    """Divide utterances into groups with the least total padded length.

    Args:
        lengths: [n], in any unit.
        groups: Number of groups; with fewer utterances, each is a group.

    Returns:
        The indices of each group's utterances, sorted by length, as are the groups. The last of a group is its longest.
    """
    length = np.asarray(lengths, dtype=np.float64)
    order = np.argsort(length, kind="stable")
    length = length[order]
    ends = np.unique(np.linspace(0, len(order), min(len(order), _MAX_EDGES) + 1).round().astype(np.int64))
    size = ends[None] - ends[:, None]
    # padded[i, j]: length of one group from end i to end j.
    padded = np.where(size > 0, size * length[ends - 1], np.inf)
    least, previous_ends = padded[0], []
    for _ in range(1, min(groups, len(ends) - 1)):
        through = least[:, None] + padded
        previous_ends.append(through.argmin(axis=0))
        least = through.min(axis=0)
    cuts, at = [], len(ends) - 1
    for before in reversed(previous_ends):
        at = int(before[at])
        cuts.append(int(ends[at]))
    return np.split(order, cuts[::-1])


def padded_length(lengths: Sequence[float] | np.ndarray, groups: int) -> float:
    """Return the total padded length of utterances that are grouped by `group_by_length`."""
    length = np.asarray(lengths, dtype=np.float64)
    return float(sum(length[rows[-1]] * len(rows) for rows in group_by_length(length, groups)))
