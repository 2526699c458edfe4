import argparse
import errno
from pathlib import Path
from unittest.mock import Mock

import pytest

from shards.corpora import CORPORA, existing, module
from shards.errors import UserError
from tests.shards import tiny_corpora as tiny
from tests.shards.corpora.reading import load_corpus, read

SHARED = Path(__file__).parents[3].parent / "shared/data"


@pytest.mark.parametrize("name", CORPORA)
def test_every_corpus_has_a_module_that_says_how_it_works(name):
    assert module(name).__doc__
    parser = argparse.ArgumentParser()
    module(name).add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-such-option"])


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "scenes"])
@pytest.mark.parametrize("there", [True, False])
def test_wrong_root_is_named(tmp_path, name, there):
    root = tmp_path if there else tmp_path / "nowhere"
    with pytest.raises(UserError, match="--root") as caught:
        read(name, "--root", root)
    assert str(root) in str(caught.value)


LONG = "x" * 300  # no file system has such a name


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "scenes"])
def test_a_root_that_cannot_be_accessed_is_named(tmp_path, name):
    with pytest.raises(UserError, match=r"no such folder, or no access to it \(--root\)"):
        read(name, "--root", tmp_path / LONG)


def test_a_candidate_that_cannot_be_accessed_is_missing(tmp_path):
    with pytest.raises(UserError, match="is missing: look"):
        existing(tmp_path, LONG, hint="look")


def test_a_table_in_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "iterdir", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match=f"{tmp_path} cannot be listed: Permission denied"):
        read("table", "--root", tmp_path)


def test_skip_bad_leaves_missing_files_to_the_writer(tmp_path, caplog):
    root = tiny.flickr8k(tmp_path)
    (root / "flickr_audio/wavs/1001_ab1_0.wav").unlink()
    corpus = load_corpus("flickr8k", "--root", root, "--skip-bad")
    assert (len(corpus.items), corpus.dropped) == (5, [])
    assert "1001_ab1_0.wav is missing: complete the corpus\n" in caplog.text


@pytest.mark.skipif(not (SHARED / "flickr8k").is_dir(), reason="no Flickr8k")
def test_real_recordings():
    items = read("flickr8k", "--root", SHARED / "flickr8k")
    assert len(items) == 10
    assert all(len(item.captions) == 5 and all(one.text and one.speaker for one in item.captions) for item in items)
