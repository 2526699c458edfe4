"""Parsing of the output of SLURM's commands; tests/slurm runs the real ones."""

import pytest

from launch.slurm.client import SlurmJob, find_jobs, job_number
from shards.errors import UserError
from tests.launch.cluster import use_fake_slurm, write_commands

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
def test_the_job_number_beside_greetings(greeting, answer, after):
    text = f"{greeting}{answer}{after}"
    assert job_number(text) == "123"
    assert job_number(text.replace("\n", "\r\n").encode()) == "123"


@pytest.mark.parametrize("answer", ["", "queued", "your job 12 waits", "Submitted batch job", "Submitted batch job x"])
def test_no_job_number(answer):
    with pytest.raises(UserError, match="names no job; if squeue --me shows it, end it with scancel") as caught:
        job_number(answer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("listed", ["7_[0,2-4]", "7_[0,2-4%2]", "7_[0-4:2,3]"])
def test_members_of_an_array_that_never_began_share_a_line(tmp_path, monkeypatch, listed):
    use_fake_slurm(monkeypatch, tmp_path / "slurm")
    answer = f"echo '7_1|COMPLETED'; echo '{listed}|CANCELLED by 0'; echo '8|TIMEOUT'"
    write_commands(tmp_path / "slurm", {"sacct": answer})
    cancelled, gone = SlurmJob("CANCELLED", "", False), SlurmJob("", "", False)
    found = find_jobs(["7_0", "7_1", "7_2", "7_3", "7_4", "7_9", "8"])
    assert found == {
        **dict.fromkeys(("7_0", "7_2", "7_3", "7_4"), cancelled),
        "7_1": SlurmJob("COMPLETED", "", False), "7_9": gone, "8": SlurmJob("TIMEOUT", "", False),
    }  # fmt: skip
