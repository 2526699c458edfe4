"""Results made up from random ranks."""

import numpy as np

from toolkit.evaluation.results import DIRECTIONS, Ranks, save_result

CAPTIONS = 3


def ranks(pictures, seed=0, hit=None):
    """Ranks of both directions without ties; with `hit`, bool [pictures], of all queries of each picture."""
    chance = np.random.default_rng(seed)
    names = np.array([f"p{number:03d}" for number in range(pictures)])
    spoken = np.array([f"{name}#{number}" for name in names for number in range(CAPTIONS)])
    both = {}
    for direction, query, picture in (
        (DIRECTIONS[0], spoken, names.repeat(CAPTIONS)),
        (DIRECTIONS[1], names, names),
    ):
        ahead = (
            chance.integers(0, 12, len(query))
            if hit is None
            else np.where(np.repeat(hit, len(query) // pictures), 0, 9)
        )
        both[direction] = Ranks(query, picture, ahead, np.zeros_like(ahead), np.ones_like(ahead))
    return both


def made(folder, pictures, seed=0, **changes):
    """A stored result with random ranks."""
    both = ranks(pictures, seed)
    columns = {
        "image_id": np.char.encode(both["image_to_speech"].picture, "utf-8"),
        "caption_picture": np.arange(pictures, dtype=np.int32).repeat(CAPTIONS),
        "caption_number": np.tile(np.arange(CAPTIONS, dtype=np.int32), pictures),
        "query_picture": np.arange(pictures, dtype=np.int32),
    }
    for direction, each in both.items():
        for name, values in (("ahead", each.ahead), ("tied", each.tied), ("right", each.correct)):
            columns[f"coarse.{direction}.{name}"] = values.astype(np.int32)
    recall = {direction: {"R@1": 10.0, "R@5": 50.0, "R@10": 90.0} for direction in DIRECTIONS}
    report = {
        "run": str(folder), "corpus": "toy", "split": "test", "manifest": "ab" * 32, "checkpoint": "best", "step": 7,
        "protocol": {"rerank": 0, "fuse": None, "max_seconds": 60.0, "image_size": 32, "resize": "crop"},
        "time": 1.0, "coarse": {**recall, "mean_R@1": 10.0}, "reranked": None, "groups": {},
    }  # fmt: skip
    return save_result(folder, report | changes, columns)
