"""Utterances of a batch in groups of like length, so that little of what is encoded is padding.

An encoder computes on a group what it computes on its longest utterance, as often as there are utterances. The best
groups are runs of the utterances sorted by length, and where the runs begin and end is found by dynamic programming:
the least padded length of the first j utterances in g runs follows from that of fewer utterances in g - 1.

There are always as many groups, on all ranks alike, even where fewer would do: under ZeRO 3 a run through the encoder's
layers is a number of collectives.
"""

from collections.abc import Sequence

import numpy as np

_EDGES = 512  # places where a group may end, of more utterances than that: the time is their square


def group_by_length(lengths: Sequence[float] | np.ndarray, groups: int) -> list[np.ndarray]:
    """Put utterances in so many groups that the sum of their padded lengths is the least.

    Args:
        lengths: [n], in any unit.
        groups: how many; of fewer utterances each is one.

    Returns:
        The places of each group's utterances, by length; the groups by length too. A group is as long as its last.
    """
    length = np.asarray(lengths, dtype=np.float64)
    order = np.argsort(length, kind="stable")
    length = length[order]
    ends = np.unique(np.linspace(0, len(order), min(len(order), _EDGES) + 1).round().astype(np.int64))
    size = ends[None] - ends[:, None]
    # padded[i, j]: length of one group from end i to end j.
    padded = np.where(size > 0, size * length[ends - 1], np.inf)
    least, came_from = padded[0], []
    for _ in range(1, min(groups, len(ends) - 1)):
        through = least[:, None] + padded
        came_from.append(through.argmin(axis=0))
        least = through.min(axis=0)
    cuts, at = [], len(ends) - 1
    for before in reversed(came_from):
        at = int(before[at])
        cuts.append(int(ends[at]))
    return np.split(order, cuts[::-1])


def padded_length(lengths: Sequence[float] | np.ndarray, groups: int) -> float:
    """Sum of the padded lengths of utterances that are grouped so."""
    length = np.asarray(lengths, dtype=np.float64)
    return float(sum(length[rows[-1]] * len(rows) for rows in group_by_length(length, groups)))
