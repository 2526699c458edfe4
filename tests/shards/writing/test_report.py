"""The report of a run, and the estimate of a dry run."""

import io
import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import soundfile

from shards.corpora.item import Caption, Item
from shards.errors import UserError
from shards.report import Dropped, Report, load_report
from shards.writing.folder_lock import Part
from shards.writing.writer import Format, estimate_sizes, merge_shards, plan_shards, write_part, write_shards
from tests.shards import tiny_corpora as tiny
from tests.shards.tars.stock_tars import members
from tests.shards.writing.small_corpus import ITEMS, drawn, tone, write, write_one_part


def test_report(tmp_path):
    report = write(ITEMS, tmp_path, samples_per_shard=2)
    train = report.splits["train"]
    assert (train.pictures, train.captions, train.speakers) == (3, 6, {"speaker 0", "speaker 1", "speaker 2"})
    assert train.seconds == pytest.approx(1.2)
    lines = report.text().splitlines()
    assert lines[1].split() == ["train", "3", "6", "0.00", "3"]
    assert lines[4].split() == ["all", "5", "9", "0.00", "3"]
    assert lines[5].startswith("4 shards")
    assert lines[6:] == ["seconds       captions", "0 to 1               9  " + 40 * "#", "nothing dropped"]
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["durations"] == [9]
    assert sorted(stored) == ["bytes", "dropped", "durations", "shards", "splits"]


LEFT_OUT = Dropped("caption", "u", "train", "t.csv line 3: no audio", captions=1)


@pytest.mark.parametrize("parts", [1, 2])
def test_what_was_left_out_when_the_corpus_was_read_is_reported(tmp_path, parts):
    if parts == 1:
        write_shards(ITEMS, tmp_path, "tiny", Format(), {}, dropped=[LEFT_OUT])
    else:
        planned = plan_shards(ITEMS, "tiny", Format(), {}, parts, [LEFT_OUT])
        for number in range(1, parts + 1):
            write_part(planned, tmp_path, Part(number, parts))
        merge_shards(tmp_path)
    assert load_report(tmp_path).dropped == [LEFT_OUT]


def doubtful(folder):
    """Pictures with recordings that are clipped, silent, very quiet, in opposite channels, and fine."""
    wave = tone()[0][0]
    recordings = {
        "loud": (2 * wave.clip(-0.25, 0.25)) * 2,
        "mute": 0 * wave,
        "fine": wave,
        "faint": wave / 200,
        "opposite": np.stack([wave, -0.9 * wave], axis=1),
    }
    items = []
    for n, (name, samples) in enumerate(recordings.items()):
        soundfile.write(folder / f"{name}.wav", samples, 16000)
        items.append(Item(f"p{n}", "train", tiny.photo(folder / f"{n}.jpg"), (Caption(name, folder / f"{name}.wav"),)))
    return items


@pytest.mark.parametrize("parts", [1, 2])
def test_recordings_to_listen_to_are_counted_and_named(tmp_path, parts):
    items, out = doubtful(tmp_path), tmp_path / "out"
    if parts == 1:
        report = write(items, out, samples_per_shard=1)
    else:
        for number in (2, 1):
            write_one_part(items, out, number, 2)
        report = merge_shards(out)
    assert [(one.utterance, one.sample, one.caption, one.what.partition(":")[0]) for one in report.warnings] == [
        ("loud", "p0", 0, "clipped"),
        ("mute", "p1", 0, "silence"),
        ("faint", "p3", 0, "very quiet"),
        ("opposite", "p4", 0, "cancelled"),
    ]
    assert all(f"{one.sample}.0.flac" in members(out / one.shard) for one in report.warnings)
    assert load_report(out) == report
    lines = report.text().splitlines()
    at = lines.index("nothing dropped")
    assert lines[at + 1].startswith(
        "stored, but should be checked by ear: 4 audio files (1 clipped, 1 silence, 1 very quiet"
    )
    assert lines[at + 2].startswith("  train caption loud: clipped: ")
    assert (
        lines[at + 5] == "  train caption opposite: cancelled: the mean of its channels is nearly 0; channel 1 was kept"
    )
    kept = members(out / "train-000004.tar")["p4.0.flac"]
    assert np.abs(soundfile.read(io.BytesIO(kept))[0]).max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("durations", "bars"),
    [
        ([], []),
        ([3.0, 3.99, 5.5], [("3 to 4", 2, 40), ("4 to 5", 0, 0), ("5 to 6", 1, 20)]),
        (
            [1.0] * 1000 + [23.0],
            [("0 to 2", 1000, 40), *((f"{n} to {n + 2}", 0, 0) for n in range(2, 22, 2)), ("22 to 24", 1, 1)],
        ),
        (
            [100.0, 3600.0],
            [
                ("0 to 300", 1, 40),
                *((f"{n} to {n + 300}", 0, 0) for n in range(300, 3600, 300)),
                ("3600 to 3900", 1, 40),
            ],
        ),
    ],
)
def test_histogram(durations, bars):
    report = Report()
    report.add_durations(durations)
    rows = [re.fullmatch(r"(\d+ to \d+) +([\d,]+) *(#*)", line) for line in report.text().splitlines()[3:-1]]
    assert [(row[1], int(row[2].replace(",", "")), len(row[3])) for row in rows] == bars


def test_size_estimate(tmp_path):
    items = [drawn(f"t{n}", captions=1 + n % 3) for n in range(40)] + [drawn("d", "dev")]
    lines = estimate_sizes(items, Format(samples_per_shard=9)).splitlines()
    report = write(items, tmp_path / "out", samples_per_shard=9)
    train, dev, every = (line.split() for line in lines[1:4])
    assert train[:4] == ["train", "40", "79", "5"]
    assert dev[:4] == ["dev", "1", "2", "1"]
    assert every[:4] == ["all", "41", "81", "6"]
    assert float(every[5]) == pytest.approx(report.bytes / 1e6, rel=0.3, abs=0.1)
    assert lines[4] == "hours and MB are estimated from 9 samples; nothing is written"
    with pytest.raises(UserError, match="occurs 2 times"):
        estimate_sizes(items + items[:1], Format())


def test_estimate_of_longer_speech():
    minute = Caption("m", partial(tone, seconds=60))
    items = [replace(drawn(f"{n}"), captions=(minute,)) for n in range(120)]
    row = estimate_sizes(items, Format(codec="wav")).splitlines()[1].split()
    assert row[:5] == ["train", "120", "120", "1", "2.00"]
    assert float(row[5]) == pytest.approx(120 * 60 * 32000 / 1e6, rel=0.01)
