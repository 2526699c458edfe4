"""The training data of a configuration: which data sets, in which order, read from where."""

import math
import os
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from shards.errors import UserError
from shards.manifest import Manifest, load
from shards.reading.cache import Cache
from shards.reading.order import Order, order_of, rank_slice
from shards.reading.reader import Reader
from toolkit.config.schema import Config, Data


def open_order(config: Config, world_size: int = 1) -> tuple[list[Manifest], Order]:
    """Read the manifests that training draws from and lay out their order; no shard is opened.

    Args:
        config: The configuration.
        world_size: Number of ranks that batches are to be divided among.

    Returns:
        The data sets of the mixture, or the one of `data.shards`, as the order numbers them, and the order.

    Raises:
        UserError: Shards are not there, have no such split, or do not fit batch size, lanes and weights.
    """
    data = config.data
    mixture = data.mixture or {data.shards: 1.0}
    for folder, weight in mixture.items():
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise UserError(f"--data.mixture gives {folder} the weight {weight!r}; expected a number above 0")
    manifests = [load(folder) for folder in mixture]
    order = order_of(
        manifests,
        data.train,
        config.training.batch_size,
        config.seed,
        data.shuffle_shards,
        data.shard_groups,
        list(mixture.values()),
    )
    rank_slice(
        order.batch_size, 0, config.training.accumulation, 0, world_size, order.shard_groups
    )  # or it does not divide
    return manifests, order


def shared_pictures(manifests: Sequence[Manifest], split: str) -> list[str]:
    """A line for each two data sets of a mixture whose training pictures share image ids.

    The identity of a picture is its data set and its place in it, so one that is in two data sets is a negative of
    itself in SIC and SIM.
    """
    lines = []
    for one, other in combinations(manifests, 2):
        count = len(np.intersect1d(one.image_id[one.rows(split)], other.image_id[other.rows(split)]))
        if count:
            lines.append(
                f"{count:,} image ids of {split} are in {one.place} and in {other.place}: if they are the same "
                "pictures, each is taken for a negative of itself; leave one of them out of a data set"
            )
    return lines


def check_dev(config: Config) -> None:
    """Make sure that there is what recall is measured on during training.

    Raises:
        UserError: There is not.
    """
    if config.evaluation.every:
        load(config.data.shards).rows(config.data.dev)


def open_reader(data: Data, *manifests: Manifest) -> Reader:
    """Read data sets through the configured cache; its path may name variables of the node's environment."""
    cache = Cache(os.path.expandvars(data.cache), data.cache_gb) if data.cache else None
    return Reader(*manifests, cache=cache)
