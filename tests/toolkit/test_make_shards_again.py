"""make_shards on a finished folder: the same corpus is left alone, and changes are noticed."""

import os
import re

import pytest

from shards.errors import UserError
from tests.shards import tiny_corpora as tiny
from tests.shards.writing.small_corpus import CHANGES, contents, identities, longer
from tests.toolkit.shard_runs import counts, make
from toolkit import make_shards

ON_DISK = [
    ("flickr8k", tiny.flickr8k),
    ("spokencoco", tiny.spokencoco),
    ("places", tiny.places),
    ("table", tiny.one_row_table),
]

LISTS = (".csv", ".json", ".txt")


def files(root, *endings):
    return [path for path in sorted(root.rglob("*")) if path.suffix in endings]


def remake(name, tmp_path, *more, root="corpus"):
    make(name, "--root", tmp_path / root, "--out", tmp_path / "out", "--jobs", 1, *more)


@pytest.fixture(params=ON_DISK, ids=lambda one: one[0])
def finished_one(request, tmp_path, capsys):
    """The name of a corpus that is made into shards, its lists in `corpus`."""
    name, corpus = request.param
    corpus(tmp_path / "corpus")
    remake(name, tmp_path)
    capsys.readouterr()
    return name


def refused(name, tmp_path, *more, **where):
    """Return the error for a corpus that changed; the shards stay as they are."""
    before = identities(tmp_path / "out")
    with pytest.raises(UserError) as caught:
        remake(name, tmp_path, *more, **where)
    assert identities(tmp_path / "out") == before
    assert caught.value.code == 2
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_an_edit_of_any_list_is_noticed(finished_one, tmp_path, capsys):
    lists = files(tmp_path / "corpus", *LISTS)
    assert lists
    for path in lists:
        data = path.read_bytes()
        path.write_bytes(data.replace(b"a", b"A", 1) if b"a" in data else data + b"\n")
        message = refused(finished_one, tmp_path)
        start = f"{tmp_path}/out is finished, but its corpus changed since: {path} was edited"
        assert message.startswith(start), message
        assert message.endswith(": give another --out, or make it again with --restart")
        assert refused(finished_one, tmp_path, "--part", "1/2").endswith(f"another --out, or remove {tmp_path}/out")
        path.write_bytes(data)
    remake(finished_one, tmp_path)
    assert "finished already, made with the same arguments\n" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "line"), CHANGES)
@pytest.mark.parametrize("endings", [(".jpg", ".png"), (".wav",)])
def test_a_change_of_any_file_is_noticed(finished_one, tmp_path, endings, change, line):
    for path in files(tmp_path / "corpus", *endings):
        data, status = path.read_bytes(), path.stat()
        change(path)
        assert f"its corpus changed since: {path} {line}: give another" in refused(finished_one, tmp_path)
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_corpus_that_was_touched_copied_or_moved_is_the_same(finished_one, tmp_path, capsys):
    before = contents(tmp_path / "out")
    for path in files(tmp_path / "corpus", *LISTS, ".jpg", ".png", ".wav"):
        os.utime(path, ns=(1, 1))
    remake(finished_one, tmp_path)
    assert "finished already, made with the same arguments\n" in capsys.readouterr().out
    (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    remake(finished_one, tmp_path, root="elsewhere")
    assert f"finished already, made from the same files, then at {tmp_path}/corpus\n" in capsys.readouterr().out
    longer(files(tmp_path / "elsewhere", ".wav")[0])
    message = refused(finished_one, tmp_path, root="elsewhere")
    assert f"shards made with root {tmp_path}/corpus, now {tmp_path}/elsewhere ({tmp_path}/elsewhere/" in message
    assert "has another size): give another --out, or remove the folder" in message
    assert contents(tmp_path / "out") == before


def test_a_missing_file_is_not_called_unchanged(finished_one, tmp_path, capsys):
    before = identities(tmp_path / "out")
    media = files(tmp_path / "corpus", ".jpg", ".png", ".wav")
    media[0].unlink()
    remake(finished_one, tmp_path)
    line = rf"the same arguments; 1 of the \d+ files of their corpus are missing \({media[0]}\): whether these changed"
    assert re.search(line, capsys.readouterr().out)
    longer(media[1])
    assert f"{media[1]} has another size" in refused(finished_one, tmp_path)
    for path in files(tmp_path / "corpus", *LISTS):
        path.unlink()
    remake(finished_one, tmp_path)
    output = capsys.readouterr().out
    assert "finished already, made with the same arguments; their corpus could not be read (" in output
    assert "): whether it changed since is unknown\n" in output
    with pytest.raises(UserError):
        remake(finished_one, tmp_path, "--restart")
    assert identities(tmp_path / "out") == before


def test_a_row_more_is_noticed_and_restart_makes_all_again(tmp_path, capsys):
    rows = [{"image": f"{n}.png", "audio": f"{n}.wav"} for n in range(3)]
    tiny.table(tmp_path / "corpus", rows[:1])
    remake("table", tmp_path)
    before = identities(tmp_path / "out")
    tiny.table(tmp_path / "corpus", rows)
    assert "table.csv was edited; 2 pictures more; 2 captions more: give" in refused("table", tmp_path)
    remake("table", tmp_path, "--restart")
    assert counts(tmp_path / "out") == {"train": 3}
    assert not before.items() & identities(tmp_path / "out").items()
    tiny.table(tmp_path / "corpus", rows[:2])
    assert "table.csv was edited; 1 picture fewer; 1 caption fewer: give" in refused("table", tmp_path)
    assert "made with quality 90, now 80: give another --out" in refused(
        "table", tmp_path, "--restart", "--quality", 80
    )
    (tmp_path / "corpus/table.csv").write_text("picture,sound\n")
    assert "table.csv was edited: give another" in refused("table", tmp_path)
    refused("table", tmp_path, "--restart")
    capsys.readouterr()


def test_a_list_that_is_there_now_is_noticed(tmp_path):
    tiny.places(tmp_path / "corpus")
    (tmp_path / "corpus/dev_unseen_2020.json").rename(tmp_path / "later")
    remake("places", tmp_path)
    (tmp_path / "later").rename(tmp_path / "corpus/dev_unseen_2020.json")
    line = "dev_unseen_2020.json is read now and was not before; 1 picture more; 1 caption more: give another"
    assert line in refused("places", tmp_path)
    remake("places", tmp_path, "--restart")
    (tmp_path / "corpus/dev_unseen_2020.json").unlink()
    assert "dev_unseen_2020.json was read before and is not now; 1 picture fewer" in refused("places", tmp_path)


def test_a_drawn_corpus_is_its_arguments(tmp_path, capsys):
    pytest.importorskip("espeakng_loader")
    for _ in range(2):
        make("scenes", "--pictures", 1, "--dev", 0, "--test", 0, "--out", tmp_path / "out", "--jobs", 1)
    assert "finished already, made with the same arguments\n" in capsys.readouterr().out


def test_folders_without_a_record_of_their_corpus(finished_one, tmp_path, capsys):
    path = tmp_path / "out/sources.json"
    data = path.read_bytes()
    for damaged in (data[:-1], data.replace(b"1", b"2", 1), b"", data + data):
        path.write_bytes(damaged)
        remake(finished_one, tmp_path)
        line = f"made with the same arguments; the record of their corpus cannot be read ({path} is damaged"
        assert line in capsys.readouterr().out
    path.unlink()
    remake(finished_one, tmp_path)
    line = "the same arguments; an earlier version did not record their corpus: whether it changed since is"
    assert line in capsys.readouterr().out


def test_a_folder_from_before_an_option_existed(tmp_path, capsys, monkeypatch):
    tiny.one_row_table(tmp_path / "corpus")
    content = make_shards._content
    with monkeypatch.context() as patch:
        patch.setattr(make_shards, "_content", lambda options: content(options) | {"other": False, "more": 3})
        remake("table", tmp_path)
    assert "made with more 3, now None" in refused("table", tmp_path)
    monkeypatch.setattr(make_shards, "_content", lambda options: content(options) | {"new": None, "more": 3})
    remake("table", tmp_path)
    assert "finished already, made with the same arguments\n" in capsys.readouterr().out


def test_an_interrupted_run_does_not_mix_old_and_new(tmp_path):
    tiny.flickr8k(tmp_path / "corpus")
    spoken = files(tmp_path / "corpus", ".wav")
    late = spoken[-1].read_bytes()
    spoken[-1].write_bytes(b"")
    with pytest.raises(UserError, match="of 5 shards are finished and kept"):
        remake("flickr8k", tmp_path, "--samples-per-shard", 1)
    spoken[-1].write_bytes(late)
    texts = tmp_path / "corpus/Flickr8k_text/Flickr8k.token.txt"
    texts.write_text(texts.read_text().replace("caption 0 of 1000_ab0", "other words"))
    tiny.speech(spoken[2], seconds=0.3)
    remake("flickr8k", tmp_path, "--samples-per-shard", 1)
    make("flickr8k", "--root", tmp_path / "corpus", "--out", tmp_path / "fresh", "--samples-per-shard", 1, "--jobs", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
