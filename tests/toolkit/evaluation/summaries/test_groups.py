"""Groups of captions against loops over sorted lists."""

import numpy as np
import pytest
import torch

from shards.errors import UserError
from shards.reading.caption_attributes import CaptionAttributes
from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.recall import recall_at
from toolkit.evaluation.summaries.groups import UNKNOWN, format_groups, group_captions, recall_by_group

OWNER = torch.repeat_interleave(torch.arange(15), 3)


def attributes(text=None, speaker=None, language=None, duration=None, accent=None):
    count = len(duration) if duration is not None else len(text or speaker or language or accent)
    nothing = [None] * count
    seconds = np.zeros(count) if duration is None else duration
    stated = (each or nothing for each in (text, speaker, language, accent))
    return CaptionAttributes(*stated, np.array(seconds, np.float32))


def test_groups_are_named_by_what_the_shards_state():
    assert group_captions(attributes(speaker=["a", None, "b"]), "speaker") == ["a", UNKNOWN, "b"]
    assert group_captions(attributes(language=["en-GB", "en-US"]), "language") == ["en-GB", "en-US"]
    assert group_captions(attributes(accent=["en-us", None]), "accent") == ["en-us", UNKNOWN]
    texts = ["one", "one two", None, "one two three", "one two three four", "one two three four five"]
    words = group_captions(attributes(text=texts), "words")
    assert words == [
        "1 words", "2 words", UNKNOWN, "3 words", "4 to 5 words", "4 to 5 words",
    ]  # fmt: skip
    for by, name in (("speaker", "speakers"), ("language", "languages"), ("accent", "accents"), ("words", "texts")):
        with pytest.raises(UserError, match=f"--by {by}: the shards state no {name}"):
            group_captions(attributes(duration=[1.0]), by)
    with pytest.raises(UserError, match="--by age: expected any of speaker, language, accent, duration, words"):
        group_captions(attributes(duration=[1.0]), "age")


def test_durations_are_binned_by_quartiles():
    seconds = np.random.default_rng(0).permutation(np.arange(1, 101) / 10)
    names = group_captions(attributes(duration=seconds), "duration")
    assert sorted({name: names.count(name) for name in names}.values()) == [25, 25, 25, 25]
    for name in set(names):
        low, high = (float(word) for word in name.replace(" s", "").split(" to "))
        inside = [value for value, other in zip(seconds, names, strict=True) if other == name]
        assert (min(inside), max(inside)) == pytest.approx((low, high))
    assert set(group_captions(attributes(duration=[2.0] * 9), "duration")) == {"2.0 s"}


@pytest.mark.parametrize("levels", [None, 1])
def test_recall_of_groups_equals_loops(levels):
    generator = torch.Generator().manual_seed(0)
    if levels:
        speech, images = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (45, 15))
    else:
        speech, images = (torch.randn(n, 8, generator=generator) for n in (45, 15))
    both = rank_both(speech, images, OWNER, 5)
    groups = [("left", "right", "few")[int(n)] for n in np.random.default_rng(1).choice(3, 45, p=[0.5, 0.4, 0.1])]
    report = recall_by_group(*both, groups)
    assert list(report) == sorted(set(groups), key=lambda name: -groups.count(name))
    scores = speech @ images.T
    for name, found in report.items():
        members = [caption for caption in range(45) if groups[caption] == name]
        assert found["captions"] == len(members)
        pictures = sorted({int(OWNER[caption]) for caption in members})
        assert found["pictures"] == len(pictures)
        for k in (1, 5, 10):
            hits = [hit(scores[c].tolist(), {int(OWNER[c])}, k) for c in members]
            assert found["speech_to_image"][f"R@{k}"] == pytest.approx(100 * np.mean(hits), abs=1e-3)
            hits = [hit(scores[:, p].tolist(), {c for c in members if OWNER[c] == p}, k) for p in pictures]
            assert found["image_to_speech"][f"R@{k}"] == pytest.approx(100 * np.mean(hits), abs=1e-3)
        both_ones = found["speech_to_image"]["R@1"] + found["image_to_speech"]["R@1"]
        assert found["mean_R@1"] == pytest.approx(both_ones / 2, abs=1e-3)


def hit(scores, right, k):
    """Probability that one of `right` is among the first k, by random orders of ties in closed form for one draw."""
    best = max(scores[answer] for answer in right)
    ahead = sum(score > best for score in scores)
    tied = [answer for answer, score in enumerate(scores) if score == best]
    good = sum(answer in right for answer in tied)
    miss = 1.0
    for drawn in range(max(0, min(k - ahead, len(tied)))):
        miss *= max(0, len(tied) - good - drawn) / (len(tied) - drawn)
    return 1 - miss


def test_one_group_of_all_captions_has_the_recall_of_the_split():
    generator = torch.Generator().manual_seed(2)
    both = rank_both(torch.randn(45, 8, generator=generator), torch.randn(15, 8, generator=generator), OWNER, 5)
    (report,) = recall_by_group(*both, ["all"] * 45).values()
    for direction, ranking in zip(("speech_to_image", "image_to_speech"), both, strict=True):
        assert list(report[direction].values()) == [round(recall_at(ranking.rank_counts, k), 3) for k in (1, 5, 10)]


def test_the_table_shows_the_largest_groups():
    row = {"captions": 3, "pictures": 2, "speech_to_image": {"R@1": 1.0, "R@5": 2.0, "R@10": 3.0}, "mean_R@1": 2.5}
    row["image_to_speech"] = {"R@1": 4.0, "R@5": 5.0, "R@10": 6.0}
    table = format_groups({"speaker": {f"s{number}": row for number in range(25)}, "words": {"1 to 3 words": row}})
    lines = table.splitlines()
    assert lines[0].startswith("speaker")
    assert lines[20].split() == ["s19", "3", "1.0", "2.0", "3.0", "4.0", "5.0", "6.0", "2.5"]
    assert lines[21] == "and 5 smaller groups, in the result's file"
    assert lines[-1].startswith("1 to 3 words")
    bins = dict.fromkeys((UNKNOWN, "9 to 11 words", "2 words", "10.5 to 12 words"), row)
    order = [line[:8].strip() for line in format_groups({"words": bins}).splitlines()[1:]]
    assert order == ["2 words", "9 to 11", "10.5 to", UNKNOWN[:8]]
