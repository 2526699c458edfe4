"""Following a job of SLURM through its restarts, and the end of a failing rank's log."""

import threading
import time

import pytest

from launch.job import Status
from launch.record import Submission, SubmissionRecord
from launch.status.failure import failure_of, first_failure, last_lines
from launch.status.follow import Log, Slurm, follow
from shards.errors import ExitCode
from tests.launch.records import attempt, rank


class QueuedJob(Slurm):
    """A job whose place in the queue the test decides on."""

    in_queue = True

    def alive(self):
        return self.in_queue


def recorded(folder, ranks, logs=None):
    return SubmissionRecord(folder, Submission("5", "slurm", "run", 1, ranks, [], logs=str(logs or "")))


def output(folder, text, number=0, kind="out"):
    with (folder / f"5_{number}_log.{kind}").open("a") as file:
        file.write(text)


def followed(folder, story, ranks=2, logs=None):
    """Follow a job while `story` writes what it leaves; the exit code and the job."""
    job = QueuedJob("5")
    codes = []
    of_job = recorded(folder, ranks, logs)
    thread = threading.Thread(target=lambda: codes.append(follow(job, of_job)), daemon=True)
    thread.start()
    story(job, lambda: codes)
    thread.join(30)
    assert codes, "it never ended"
    return codes[0], job


def pause():
    time.sleep(0.4)  # a few polls


def test_a_job_that_starts_again_is_followed_to_its_end(tmp_path, capsys):
    def story(job, codes):
        attempt(tmp_path, restart=0, began=1.0, hosts=["n1", "n2"])
        rank(tmp_path, 0)
        rank(tmp_path, 1, 0)
        output(tmp_path, "step 1\n")
        pause()
        rank(tmp_path, 0, ExitCode.PEER_LOST)
        attempt(tmp_path, restart=0, ended=2.0, code=137, requeued=True, why="a rank was killed: restarting")
        pause()
        assert not codes(), "the job is to start again"
        attempt(tmp_path, restart=1, began=3.0, hosts=["n3", "n4"])
        rank(tmp_path, 0, 0, restart=1)
        pause()
        assert not codes(), "rank 1 has not ended in this attempt"
        rank(tmp_path, 1, 0, restart=1)
        output(tmp_path, "step 2\n")

    code, _ = followed(tmp_path, story)
    out = capsys.readouterr().out.splitlines()
    assert code == 0
    assert sorted(out) == sorted(
        ["step 1", "job 5: a rank was killed: restarting", "job 5: restart 1 on n3, n4", "step 2"]
    )


def test_a_final_failure_is_shown_with_its_traceback(tmp_path, capsys):
    logs = tmp_path / "logs"
    logs.mkdir()

    def story(job, codes):
        attempt(tmp_path, restart=0, began=1.0, hosts=["n1"])
        rank(tmp_path, 0, ExitCode.PEER_LOST, when=1.0)
        rank(tmp_path, 1, 1, when=2.0)
        output(logs, "Traceback (most recent call last):\n  File x\nValueError: broken\n", 1, "err")
        output(logs, "Traceback (most recent call last):\nRuntimeError: Connection closed by peer\n", 0, "err")
        pause()
        assert not codes(), "its batch script has not decided yet"
        attempt(tmp_path, restart=0, ended=2.0, code=1, requeued=False, why="a rank failed", cause="failed")

    code, _ = followed(tmp_path, story, logs=logs)
    err = capsys.readouterr().err
    assert code == 1
    assert "ValueError: broken" in err
    assert "Connection closed" not in err
    assert err.splitlines()[-1] == f"error: rank 1 failed with exit code 1; the complete log is {logs / '5_1_log.err'}"


def test_a_user_error_on_the_node_is_one_line(tmp_path, capsys):
    def story(job, codes):
        rank(tmp_path, 0, 2)
        output(tmp_path, "submitit noise\nerror: mend it\n", kind="err")
        attempt(tmp_path, restart=0, ended=2.0, code=2, requeued=False, why="a mistake")

    code, _ = followed(tmp_path, story, ranks=1)
    assert (code, capsys.readouterr().err) == (2, "error: mend it\n")


def test_a_cancelled_job_ends_with_the_code_of_one_that_has_saved(tmp_path, capsys):
    def story(job, codes):
        rank(tmp_path, 0, 75)
        attempt(tmp_path, restart=0, ended=2.0, code=75, requeued=False, why="cancelled", cause="cancelled")

    code, _ = followed(tmp_path, story, ranks=1)
    captured = capsys.readouterr()
    assert code == 75
    assert "stopped by a signal, and saved" in captured.err
    assert "job 5: cancelled" in captured.out


def test_a_job_that_vanishes_is_not_waited_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launch.status.follow._FILE_DELAY", 0.2)

    def story(job, codes):
        rank(tmp_path, 0)
        pause()
        job.in_queue = False

    code, _ = followed(tmp_path, story, ranks=1)
    assert code == 1
    assert "rank 0 was killed, or ran out of memory or time" in capsys.readouterr().err


BROKEN = "Traceback (most recent call last):\n  File \"x.py\", line 1\nModuleNotFoundError: No module named 'numpy'\n"
STEP_ENDED = """\
srun: error: node1: task 0: Exited with exit code 1
slurmstepd-node1: error: *** STEP 5.0 ON node1 CANCELLED AT 2026-01-01T00:00:00 ***
"""


@pytest.mark.parametrize(
    ("text", "code", "how"),
    [
        (BROKEN + STEP_ENDED, 1, "rank 0 ended with exit code 1 before it began to train: ModuleNotFoundError: No "
         "module named 'numpy'"),
        ("slurmstepd-node1: error: execve(): /no/python: No such file\n" + STEP_ENDED, 2, "rank 0 ended with exit code "
         "2 before it began to train: slurmstepd-node1: error: execve(): /no/python: No such file"),
        (BROKEN, None, "rank 0 ended before it began to train: ModuleNotFoundError: No module named 'numpy'"),
        ("a warning\n", None, "rank 0 ended before it began to train"),
        ("", None, "rank 0 was killed, or ran out of memory or time"),
    ],
)  # fmt: skip
def test_a_rank_that_could_not_begin_is_explained_by_its_log(tmp_path, capsys, monkeypatch, text, code, how):
    monkeypatch.setattr("launch.status.follow._FILE_DELAY", 0.2)

    def story(job, codes):
        output(tmp_path, text, kind="err")
        if code is not None:
            Status(tmp_path, 0).write_failed_start(code, 0)
            attempt(tmp_path, restart=0, began=1.0, ended=2.0, code=143, requeued=False, why=how, cause="failed")
        job.in_queue = False

    ended, _ = followed(tmp_path, story, ranks=1)
    err = capsys.readouterr().err.splitlines()
    assert ended == (code or 1)
    assert err[-1] == f"error: {how}; the complete log is {tmp_path / '5_0_log.err'}"
    assert err[1:-1] == text.splitlines()


def test_a_squeue_that_does_not_answer(tmp_path, monkeypatch, capsys):
    """Not even that the job is gone: no answer, then the job, then no answer, then no job."""
    answers = [None, "RUNNING node1", None, ""]
    monkeypatch.setattr("launch.status.follow.queue_state", lambda job: answers.pop(0))
    job, seen = Slurm("5"), []
    for _ in range(4):
        seen.append(job.alive())
        job.queried_at = -1e9
    assert seen == [True, True, True, False]
    assert capsys.readouterr().out == "job 5: RUNNING node1\n"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Slurm("5").alive(), "without squeue nothing is known"


def test_a_job_that_comes_back_into_the_queue_is_not_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.status.follow._FILE_DELAY", 0.6)

    def story(job, codes):
        rank(tmp_path, 0)
        for _ in range(3):
            job.in_queue = False
            pause()
            job.in_queue = True
            pause()
        assert not codes()
        rank(tmp_path, 0, 0)

    assert followed(tmp_path, story, ranks=1)[0] == 0


def test_a_log_is_printed_line_by_line(tmp_path, capsys):
    log, shown = Log(tmp_path / "log"), []

    def show(text, **options):
        with log.path.open("a") as file:
            file.write(text)
        log.show(**options)
        shown.append(capsys.readouterr().out)

    log.show()  # there is no file yet
    show("one\nsubmitit INFO (now) - noise\ntw")
    show("o\nthree")
    show("", to_the_end=True)
    log.path.write_text("")  # it is rewritten, from its start
    show("after\n")
    assert shown == ["one\n", "two\n", "three", "after\n"]


def test_the_rank_that_failed_first(tmp_path):
    alive = {1: False}

    def failed(ranks=3, gone=False, restart=0):
        return first_failure(recorded(tmp_path, ranks), lambda pid: not alive[pid], gone, restart)

    assert failed() is None
    assert failed(gone=True) == 0
    for number, (code, when) in enumerate([(ExitCode.PEER_LOST, 1.0), (75, 2.0), (1, 3.0), (1, 4.0)]):
        rank(tmp_path, number, code, when=when)
    assert failed(4) == 2, "ranks that lost their connection come after it"
    assert failed(2) == 0
    assert failed(4, restart=1) is None
    rank(tmp_path, 1)  # whose process died without a code
    assert failed(4) == 1
    alive[1] = True
    assert failed(4) == 2


@pytest.mark.parametrize("noise", [0, 30])
def test_the_end_of_a_log_begins_with_its_last_traceback(tmp_path, noise):
    log = tmp_path / "log"
    before = [f"line {number}" for number in range(50)] + ["Traceback (most recent call last):", "KeyError: old"]
    last = ["Traceback (most recent call last):", *(f"  frame {number}" for number in range(30)), "ValueError: x"]
    log.write_text("\n".join([*before, *last, *noise * ["a warning"]]))
    lines = last_lines(log)
    assert lines[: len(last)] == last
    if not noise:
        assert lines == last


def test_the_end_of_a_log_without_one(tmp_path):
    log = tmp_path / "log"
    log.write_text("".join(f"{number}\n" for number in range(100_000)))
    assert last_lines(log) == [str(number) for number in range(99_980, 100_000)]
    assert last_lines(tmp_path / "none") == []
    assert failure_of(recorded(tmp_path, 4), 3).how == "rank 3 was killed, or ran out of memory or time"
