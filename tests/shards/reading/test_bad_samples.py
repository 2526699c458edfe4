"""Counting bad samples: what is logged, and when the limits are exceeded."""

import pytest

from shards.errors import UserError
from shards.reading.bad_samples import BadSample, BadSampleCounter


def bad_sample(row: int = 0, step: int = 0, sample: str = "p7") -> BadSample:
    return BadSample(sample, "data/train-000003.tar", "cannot be decoded", step, row)


def counter(most: int = 1000, in_a_row: int = 50) -> tuple[BadSampleCounter, list[float]]:
    now = [0.0]
    return BadSampleCounter(most, in_a_row, lambda: now[0]), now


def test_the_first_five_are_logged_and_then_one_in_thirty_seconds(caplog: pytest.LogCaptureFixture) -> None:
    bad_samples, now = counter()
    for second in range(100):
        now[0] = float(second)
        bad_samples.add([bad_sample(sample=f"p{7 + second % 3}")], rows=4)
    lines = caplog.messages
    assert lines[0] == "replaced unreadable sample p7 of data/train-000003.tar at step 0: cannot be decoded"
    counts = [line.rpartition(" (")[2] for line in lines[1:]]
    assert counts == [f"{n} times so far, bad samples: {min(n, 3)})" for n in (2, 3, 4, 5, 35, 65, 95)]


def test_too_many_in_all() -> None:
    bad_samples, _ = counter(most=3)
    for _ in range(100):  # epochs
        for n in range(3):
            bad_samples.add([bad_sample(sample=f"p{n}")], rows=2)
    assert (bad_samples.total, len(bad_samples.samples)) == (300, 3)
    with pytest.raises(
        UserError,
        match=r"^too many samples, 4 in all, could .* sample p7 of data/train-000003\.tar at .*--data\.max_bad_samples",
    ):
        bad_samples.add([bad_sample()], rows=2)


@pytest.mark.parametrize(
    ("batches", "in_a_row"),
    [
        ([[0, 1, 2, 3]], 4),
        ([[3, 3, 3]], 3),  # replacements of one row that could not be read either
        ([[1, 3]], 1),
        ([[0, 2]], 0),
        ([[2, 3], [0, 1, 2, 3]], 6),
        ([[2, 3], [0, 1]], 0),
        ([[2, 3], [1, 3]], 1),
        ([[3], [], [3]], 1),
    ],
)
def test_a_row_of_bad_samples_goes_on_across_batches_and_ends_with_a_good_sample(batches, in_a_row) -> None:
    bad_samples, _ = counter()
    for rows in batches:
        bad_samples.add([bad_sample(row) for row in rows], rows=4)
    assert bad_samples.in_a_row == in_a_row
    assert bad_samples.total == sum(len(rows) for rows in batches)


def test_too_many_in_a_row() -> None:
    bad_samples, _ = counter(in_a_row=5)
    bad_samples.add([bad_sample(2), bad_sample(3)], rows=4)
    bad_samples.add([bad_sample(0), bad_sample(1), bad_sample(2)], rows=4)
    bad_samples.add([bad_sample(0), bad_sample(1), bad_sample(2), bad_sample(3)], rows=4)
    with pytest.raises(UserError, match=r"^too many samples, 6 in a row,.*--data\.max_bad_samples_in_a_row"):
        bad_samples.add([bad_sample(0), bad_sample(1, step=9)], rows=4)
