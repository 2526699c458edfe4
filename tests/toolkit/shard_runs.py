"""Runs of make_shards, and what they wrote."""

import subprocess
import sys
from pathlib import Path

from shards.manifest import load
from tests.shards.writing.small_corpus import identities
from toolkit.make_shards import main

ROOT = Path(__file__).parents[2]


def make(*arguments):
    main([str(one) for one in arguments])


def start(*arguments, **how):
    """Run the script as a user does, in another folder."""
    command = [sys.executable, ROOT / "toolkit/make_shards.py", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", **how)


def finished(folder):
    """The shards of an unfinished folder that a rerun may not touch."""
    return {name: how for name, how in identities(folder).items() if (folder / f".unfinished/{name}.json").exists()}


def counts(folder):
    made = load(folder)
    return {split: len(made.rows(split)) for split in made.splits}
