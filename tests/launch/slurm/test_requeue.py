"""Requeue logic of the batch script with a stub of scontrol; tests/slurm has the real one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from launch.job import Status
from launch.record import Submission, SubmissionRecord, read_attempts
from launch.slurm.requeue import SlurmJobState, begin, decide, end, member_folder, newest_step, setup_lines, srun_exits
from launch.status.failure import failure_of, first_failure
from shards.errors import ExitCode

ROOT = Path(__file__).resolve().parents[3]
RUNNING = SlurmJobState("RUNNING", "None", 0)


def read(folder):
    return [asdict(each) for each in read_attempts(folder)]


ENDING = SlurmJobState("COMPLETING", "None", 0)


@pytest.mark.parametrize(
    ("code", "exits", "seen", "idle", "cause", "requeue"),
    [
        (0, [0, 0], RUNNING, [], "done", False),
        (75, [75, 75], RUNNING, [], "saved", True),
        (137, [75, None], RUNNING, None, "saved", True),  # the slower one was ended by --kill-on-bad-exit
        (137, [75, None], RUNNING, ["saved"], "killed", True),  # and here none had saved: the other was stopped by srun
        (137, [75, None], RUNNING, 3 * ["killed"], "killed", False),
        (75, [75], RUNNING, 19 * ["saved"], "saved", True),
        (75, [75], RUNNING, 20 * ["saved"], "saved", False),
        (2, [2, 2], RUNNING, [], "mistake", False),
        (137, [2, None], RUNNING, [], "mistake", False),
        (137, [None, 1], RUNNING, [], "failed", False),
        (137, [ExitCode.PEER_LOST, 1], RUNNING, [], "failed", False),
        (1, [], RUNNING, [], "failed", False),  # srun itself failed
        (130, [130], RUNNING, [], "failed", False),  # interrupted by hand
        (137, [None, None], RUNNING, [], "killed", True),
        (137, [ExitCode.PEER_LOST, None], RUNNING, 2 * ["killed"], "killed", True),
        (137, [ExitCode.PEER_LOST, None], RUNNING, 3 * ["killed"], "killed", False),
        (137, [None, None], RUNNING, ["killed", "saved", "slurm", "saved", "killed"], "killed", True),
        (70, [None, None], RUNNING, [], "killed", True),  # the watchdog
        (134, [0, None], RUNNING, [], "killed", True),
        (75, [75, 75], ENDING, [], "cancelled", False),
        (137, [None, None], ENDING, [], "cancelled", False),
        (75, [75, 75], SlurmJobState("COMPLETING", "None", 1), [], "slurm", False),  # SLURM restarts it by itself
        (137, [None], SlurmJobState("COMPLETING", "TimeLimit", 0), [], "killed", True),
        (75, [75], None, [], "saved", True),  # the controller does not answer
    ],
)
def test_restart_decision(code, exits, seen, idle, cause, requeue):
    decision = decide(code, exits, seen, 0, idle)
    assert (decision.cause, decision.requeue) == (cause, requeue)


@pytest.mark.parametrize(
    ("code", "exits", "seen", "cause"),
    [
        (143, [], RUNNING, "failed"),  # srun ended the others, and its code is theirs
        (143, [75], RUNNING, "failed"),  # another began, and received srun's TERM
        (143, [None, ExitCode.PEER_LOST], RUNNING, "failed"),
        (2, [2], RUNNING, "mistake"),  # of a rank that began: it knows more
        (143, [], ENDING, "cancelled"),
        (143, [], SlurmJobState("COMPLETING", "None", 1), "slurm"),
    ],
)
def test_restart_decision_where_a_rank_failed_before_it_began(code, exits, seen, cause):
    decision = decide(code, exits, seen, 0, [], "rank 1 ended: why")
    assert (decision.cause, decision.requeue) == (cause, False)
    assert cause != "failed" or decision.why == "rank 1 ended: why: no restart"


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stub that prints the file `shown` and records its calls."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "shown").write_text("JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1")
    (tools / "scontrol").write_text(
        f'#!/bin/sh\nif [ "$2" = hostnames ]; then echo node3; echo node4; exit; fi\necho "$@" >> {tools}/calls\n'
        f"if [ -e {tools}/away ]; then rm {tools}/away; echo 'Unable to contact slurm controller' >&2; exit 1; fi\n"
        f'if [ -e {tools}/refuse ] && [ "$1" = requeue ]; then echo Access denied >&2; exit 1; fi\ncat {tools}/shown\n'
    )
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tools


def environment(restart=0, **more):
    return {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_RESTART_COUNT": str(restart), **more}


@pytest.fixture
def folder(tmp_path):
    """The log folder of a run's job."""
    folder = tmp_path / "run" / "logs" / "now"
    folder.mkdir(parents=True)
    return folder


def checkpoint(folder, step):
    there = folder.parent.parent / "checkpoints" / f"step-{step:08d}"
    there.mkdir(parents=True)
    (there / "progress.json").touch()


def test_attempts_are_recorded(folder, scontrol):
    begin(folder, environment())
    checkpoint(folder, 40)
    (folder.parent.parent / "checkpoints" / ".step-00000050-x").mkdir()
    Status(folder, 0).write(75)
    end(folder, 75, environment())
    assert (scontrol / "calls").read_text().splitlines() == ["--oneliner show job 7", "requeue 7"]
    begin(folder, environment(1))  # and no end: a power cut
    begin(folder, environment(2))
    end(folder, 0, environment(2))
    first, cut, last = read(folder)
    assert first["hosts"] == ["node3", "node4"]
    assert (first["began_step"], first["step"], first["code"], first["requeued"]) == (-1, 40, 75, True)
    assert first["began"] < first["ended"]
    assert (cut["code"], cut["requeued"], cut["cause"]) == (None, True, "slurm")
    assert (last["restart"], last["cause"], last["requeued"]) == (2, "done", False)
    assert newest_step(folder) == 40


TRACEBACK = "Traceback (most recent call last):\n  File \"node.py\", line 1\nModuleNotFoundError: No module named 'x'\n"
TERMINATED = """\
srun: launch/slurm: _step_signal: Terminating StepId=7.0
slurmstepd-node3: error: *** STEP 7.0 ON node3 CANCELLED AT 2026-01-01T00:00:00 ***
srun: error: node4: tasks 2-3: Terminated
srun: Force Terminated StepId=7.0
"""


@pytest.mark.parametrize(
    ("messages", "codes"),
    [
        ("srun: error: node1: task 1: Exited with exit code 1\n" + TERMINATED, {1: 1}),
        ("noise\nsrun: error: node[1-2]: tasks 0-1,3: Exited with exit code 127\n", {0: 127, 1: 127, 3: 127}),
        ("srun: error: a: task 0: Exited with exit code 2\nsrun: error: b: task 1: Exited with exit code 1\n",
         {0: 2, 1: 1}),
        ("srun: error: node2: task 2: Killed\n" + TERMINATED, {}),
        ("srun: error: node1: task 0: Out Of Memory\n", {}),
        ("srun: error: node1: task 0: Segmentation fault (core dumped)\n", {}),
        ("srun: error: Node failure on node2\nsrun: Job step aborted: Waiting up to 32 seconds\n", {}),
    ],
)  # fmt: skip
def test_exit_codes_in_the_messages_of_srun(messages, codes):
    assert srun_exits(messages) == codes


@pytest.mark.parametrize(
    ("messages", "rank", "logged", "why"),
    [
        ("task 1: Exited with exit code 1", 1, TRACEBACK, "ended with exit code 1 before it began to train: "
         "ModuleNotFoundError: No module named 'x'"),
        ("task 0: Exited with exit code 2", 0, "slurmstepd-node3: error: execve(): /no/python: Not found\n",
         "ended with exit code 2 before it began to train: slurmstepd-node3: error: execve(): /no/python: Not found"),
        ("tasks 2-3: Exited with exit code 127", 2, "bash: line 1: apptainer: command not found\n",
         "ended with exit code 127 before it began to train: bash: line 1: apptainer: command not found"),
        ("task 3: Exited with exit code 255", 3, "FATAL:   could not open image /i.sif\n",
         "ended with exit code 255 before it began to train: FATAL:   could not open image /i.sif"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("others", [{}, {1: 75, 0: None}], ids=["none began", "others began"])
def test_a_rank_that_fails_before_it_begins_is_not_restarted(folder, scontrol, messages, rank, logged, why, others):
    begin(folder, environment())
    for other, code in others.items():
        if other != rank:
            Status(folder, other).write(code)
    with (folder / f"7_{rank}_log.err").open("a") as file:
        file.write(logged)
    with (folder / "7_0_log.err").open("a") as file:
        file.write(f"srun: error: node3: {messages}\n{TERMINATED}")
    end(folder, 143, environment())
    [only] = read(folder)
    assert (only["cause"], only["requeued"]) == ("failed", False)
    assert only["why"] == f"rank {rank} {why}: no restart"
    recorded = SubmissionRecord(folder, Submission("7", "slurm", "run", 2, 4, []))
    assert first_failure(recorded, lambda pid: False, True) == rank
    assert failure_of(recorded, rank).how == f"rank {rank} {why}"


def test_an_earlier_attempt_is_not_reported_again(folder, scontrol):
    """The log grows: messages of srun on another attempt are ignored."""
    (folder / "7_0_log.err").write_text("srun: error: node3: task 1: Exited with exit code 1\n")
    begin(folder, environment(1))
    with (folder / "7_0_log.err").open("a") as file:
        file.write("srun: error: node3: task 1: Killed\n")
    end(folder, 143, environment(1))
    assert (read(folder)[-1]["cause"], read(folder)[-1]["requeued"]) == ("killed", True)
    assert not (folder / "rank1.json").exists()


def test_the_status_of_a_rank_that_began_decides(folder, scontrol, monkeypatch):
    begin(folder, environment())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    for rank, code in {0: ExitCode.PEER_LOST, 1: None}.items():
        Status(folder, rank).write(code)
    codes = {0: ExitCode.PEER_LOST, 1: 1}
    lines = [f"srun: error: node3: task {rank}: Exited with exit code {code}\n" for rank, code in codes.items()]
    (folder / "7_0_log.err").write_text("".join(lines))
    end(folder, 143, environment())
    assert read(folder)[-1]["requeued"] is True
    assert Status(folder, 1).read()["exit"] is None


def test_the_error_of_an_srun_that_cannot_begin_is_recorded(folder, scontrol):
    begin(folder, environment())
    (folder / "7_0_log.err").write_text("srun: error: Unable to create step for job 7: Invalid account\n")
    end(folder, 1, environment())
    [only] = read(folder)
    assert only["cause"] == "failed"
    assert only["why"].startswith("no rank began, srun ended with exit code 1: srun: error: Unable to create step")


def test_restarts_without_a_new_checkpoint_are_limited(folder, scontrol):
    requeues = []
    for restart in range(8):
        begin(folder, environment(restart))
        if restart == 1:
            checkpoint(folder, 10)
        before = (scontrol / "calls").read_text().count("requeue") if (scontrol / "calls").exists() else 0
        end(folder, 137, environment(restart))
        requeues.append((scontrol / "calls").read_text().count("requeue") - before)
    # The first did not get far, the second saved; after it three more are tried.
    assert requeues[:6] == [1, 1, 1, 1, 1, 0]


def test_the_status_of_an_earlier_attempt_is_ignored(folder, scontrol, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    Status(folder, 0).write(2)
    begin(folder, environment(1))
    end(folder, 137, environment(1))
    assert read(folder)[-1]["cause"] == "killed"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Status(folder, 0).write(75)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    Status(folder, 0).write(1)  # a rank of an earlier attempt
    status = Status(folder, 0).read()
    assert (status["exit"], status["restart"]) == (75, 1)


def test_an_unreachable_controller_is_waited_for(folder, scontrol):
    begin(folder, environment())
    (scontrol / "away").touch()
    end(folder, 137, environment())
    assert (scontrol / "calls").read_text().splitlines()[-1] == "requeue 7"


def test_a_refused_requeue_is_recorded(folder, scontrol):
    begin(folder, environment())
    (scontrol / "refuse").touch()
    end(folder, 137, environment())
    [only] = read(folder)
    assert only["requeued"] is False
    assert "SLURM refused: Access denied" in only["why"]


def test_a_member_of_a_job_array(folder, tmp_path, scontrol):
    grid = tmp_path / "grid"
    grid.mkdir()
    (grid / "members.json").write_text(json.dumps({"3": str(folder)}))
    array = environment(SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    assert member_folder(grid, array) == folder
    assert member_folder(grid, environment()) == grid
    begin(folder, array)
    end(folder, 75, array)
    assert (scontrol / "calls").read_text().splitlines()[-1] == "requeue 5_3"


@pytest.mark.parametrize("code", [0, 75])
def test_the_batch_script(tmp_path, scontrol, code):
    """The lines as bash runs them: the exit code of the ranks is recorded, and the script ends with it."""
    folder = tmp_path / "a run" / "logs" / "it's now"
    folder.mkdir(parents=True)
    script = "\n".join([*setup_lines(folder, sys.executable, ROOT), "kill -TERM $$", f"(exit {code})"])
    (tmp_path / "launch").mkdir()  # in the working directory, and none of ours
    (tmp_path / "launch" / "__init__.py").touch()
    variables = {**os.environ, **environment()}
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    [only] = read(folder)
    assert (only["code"], only["requeued"]) == (code, code == 75)
    assert not done.stderr


@pytest.mark.timeout(60)
def test_the_guard_ends_srun_before_slurm_ends_the_script(folder, tmp_path, scontrol):
    """Ranks that hang: srun waits for them, and the script for srun, deaf to TERM until then."""
    (scontrol / "scontrol").write_text(
        (scontrol / "scontrol")
        .read_text()
        .replace("#!/bin/sh\n", '#!/bin/sh\n[ "$2" = config ] && echo "KillWait = 1 sec"\n')
    )
    (scontrol / "srun").write_text(
        f"#!/bin/sh\ntouch {scontrol}/begun\nwhile :; do read line < {scontrol}/pipe; done\n"
    )
    (scontrol / "srun").chmod(0o755)
    os.mkfifo(scontrol / "pipe")
    script = "\n".join([*setup_lines(folder, sys.executable, ROOT), "srun"])
    variables = {**os.environ, **environment()}
    with subprocess.Popen(["bash", "-c", script], env=variables, cwd=tmp_path, start_new_session=True) as bash:
        while not (scontrol / "begun").exists():
            time.sleep(0.05)
        [guard] = [int(pid) for pid in pids_of("guard", str(bash.pid))]
        time.sleep(0.5)  # it reads KillWait first
        for pid in (bash.pid, guard):  # as SLURM does: all that the batch script has begun, its own end still to come
            os.kill(pid, signal.SIGTERM)
        assert bash.wait(20) == 137
    [only] = read(folder)
    assert (only["code"], only["cause"], only["requeued"]) == (137, "killed", True)
    assert not pids_of("guard", str(bash.pid))


def pids_of(*words):
    """Processes with these words in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if set(words) <= set(path.read_bytes().decode(errors="replace").split("\0")):
                found.append(path.parent.name)
    return found
