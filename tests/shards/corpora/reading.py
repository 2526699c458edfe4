"""Reading a corpus as make_shards does, for tests."""

import argparse
from collections import Counter

from shards.corpora import Corpus, load, module
from shards.corpora.item import Item


def load_corpus(name: str, *arguments: object) -> Corpus:
    """The items of a command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip-bad", action="store_true")
    module(name).add_arguments(parser)
    return load(name, parser.parse_args([str(one) for one in arguments]))


def read(name: str, *arguments: object) -> list[Item]:
    """The items of a corpus from which nothing is dropped."""
    corpus = load_corpus(name, *arguments)
    assert corpus.dropped == []
    return corpus.items


def splits(items: list[Item]) -> dict[str, int]:
    """How many pictures each split has."""
    return dict(Counter(item.split for item in items))
