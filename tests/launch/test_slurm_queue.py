"""What SLURM's commands say, as far as no SLURM is needed for it; tests/slurm asks the real one."""

import pytest

from launch.slurm_queue import job_number
from shards.errors import UserError

GREETINGS = ["", "Welcome! You have 3 jobs and job 12 waits.\n\n", "2024\n", "*** job 5 costs 100\nsbatch: lua: ok\n"]
ANSWERS = [
    "Submitted batch job 123",
    "Submitted batch job 123 on cluster big-1",
    "sbatch: Submitted batch job 123",
    "123",
    "123;big-1",
    " 123 ",
]


@pytest.mark.parametrize("greeting", GREETINGS)
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("after", ["", "\n", "\nEstimated cost: 40 credits for job 77\n"])
def test_the_number_among_what_a_site_adds(greeting, answer, after):
    text = f"{greeting}{answer}{after}"
    assert job_number(text) == "123"
    assert job_number(text.replace("\n", "\r\n").encode()) == "123"


@pytest.mark.parametrize("answer", ["", "queued", "your job 12 waits", "Submitted batch job", "Submitted batch job x"])
def test_no_number(answer):
    with pytest.raises(UserError, match="names no job; if squeue --me shows it, end it with scancel") as caught:
        job_number(answer)
    assert "\n" not in str(caught.value)
