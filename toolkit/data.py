"""The training data of a configuration: data sets, their order, and the reader."""

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
    """Read the manifests of the training data and build their order; no shard is opened.

    Args:
        config: The configuration.
        world_size: Number of ranks.

    Returns:
        The data sets of the mixture, or the one of `data.shards`, in the order of `order.sources`, and the order.

    Raises:
        UserError: Shards are missing, have no such split, or do not fit batch size, shard groups and weights.
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
    # Raises an error if the batch cannot be divided evenly.
    rank_slice(order.batch_size, 0, config.training.accumulation, 0, world_size, order.shard_groups)
    return manifests, order


def shared_pictures(manifests: Sequence[Manifest], split: str) -> list[str]:
    """Return a warning for each two data sets of a mixture whose training pictures share image ids.

    Sample numbers are unique per data set, so a picture that is in two data sets is a negative of itself in SIC and
    SIM.
    """
    lines = []
    for one, other in combinations(manifests, 2):
        count = len(np.intersect1d(one.image_id[one.rows(split)], other.image_id[other.rows(split)]))
        if count:
            lines.append(
                f"{count:,} image ids of {split} are in {one.location} and in {other.location}: if they are the same "
                "pictures, each is a negative of itself; remove them from one of the data sets"
            )
    return lines


def check_dev(config: Config) -> None:
    """Check that the split on which recall is measured during training exists.

    Raises:
        UserError: The shards or their split are missing.
    """
    if config.evaluation.every:
        load(config.data.shards).rows(config.data.dev)


def open_reader(data: Data, *manifests: Manifest) -> Reader:
    """Open data sets through the configured cache; its path may contain environment variables of the node."""
    cache = Cache(os.path.expandvars(data.cache), data.cache_gb) if data.cache else None
    return Reader(*manifests, cache=cache)
