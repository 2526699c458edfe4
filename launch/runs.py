"""What has become of runs: their status, a log as it grows, cancel, resume, and the table of a sweep.

A run is named by its folder. SLURM is asked where it is; without it the folder alone tells.
"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # the script's own folder is not a place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import Parser, UserError, run_main

if TYPE_CHECKING:
    from launch.record import Recorded
    from launch.status.follow import Local, Slurm
    from launch.status.state import RunState

_GRACE = 120.0  # seconds that the ranks of this machine have to save when they are cancelled
_EVERY = 5.0  # seconds between two looks at the members of a sweep


def build_parser() -> Parser:
    """The command line: a subcommand for each thing to do."""
    parser = Parser(prog="runs.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    todo = parser.add_subparsers(dest="todo", required=True, metavar="COMMAND")
    status = todo.add_parser("status", help="state, step, time left, restarts and recall of runs, and why one failed")
    status.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of them (runs)")
    status.add_argument("--json", action="store_true", help="for programs")
    one = {
        "follow": "show a run's log as it grows, until it ends; or how the members of a sweep get on",
        "cancel": "end a run's job; its ranks save first",
        "resume": "submit the recorded command again, in the same folder",
    }
    for name, line in one.items():
        todo.add_parser(name, help=line, description=line).add_argument("run", type=Path, metavar="RUN")
    table = todo.add_parser("table", help="results of a sweep so far, one row a member, and which failed")
    table.add_argument("grid", type=Path, metavar="FOLDER", help="the folder of a grid, or any folder of runs")
    table.add_argument("--json", action="store_true", help="for programs")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for.

    Raises:
        UserError: A folder is no run, or the run is not in a state for this.
        SystemExit: With the exit code of what was followed or resumed.
    """
    options = build_parser().parse_args(arguments)
    if options.todo == "status":
        status(options.runs or [Path("runs")], options.json)
    elif options.todo == "table":
        table(options.grid, options.json)
    elif options.todo == "cancel":
        cancel(options.run)
    else:
        sys.exit({"follow": follow, "resume": resume}[options.todo](options.run))


def status(folders: Sequence[Path], as_json: bool = False) -> None:
    """Print how runs stand."""
    from launch.status.state import find_runs, look
    from launch.status.tables import status_table, status_values

    runs = list(dict.fromkeys(run for folder in folders for run in find_runs(folder)))
    states = look(runs)
    print(json.dumps([status_values(state) for state in states], indent=1) if as_json else status_table(states))


def table(grid: Path, as_json: bool = False) -> None:
    """Print the results of a sweep as far as they are there."""
    from launch.status.tables import result_table, result_values

    states = member_states(grid)
    if as_json:
        print(json.dumps([result_values(state, grid) for state in states], indent=1))
    else:
        print(result_table(states, grid))


def member_states(grid: Path) -> "list[RunState]":
    """How the members of a sweep stand, in its order; of any other folder, the runs in it.

    Raises:
        UserError: The folder holds no runs.
    """
    from launch.record import newest
    from launch.status.state import find_runs, look

    last = newest(grid)
    if last and last.submission.members:
        members = last.submission.members
        return look([Path(members[index]).parent.parent for index in sorted(members, key=int)])
    return look(find_runs(grid))


def follow(run: Path) -> int:
    """Show a run's log, or how a sweep's members get on, until all has ended.

    Returns:
        The run's exit code; of a sweep 0, or 1 if a member failed.
    """
    from launch.status.follow import follow as follow_job

    recorded = _recorded(run)
    if recorded.submission.members:
        return _follow_members(run)
    return follow_job(_job(recorded), recorded.folder, recorded.submission.ranks, recorded.logs)


def _follow_members(grid: Path) -> int:
    from launch.status.state import ENDED
    from launch.status.tables import result_table

    told: dict[Path, str] = {}
    while True:
        states = member_states(grid)
        for state in states:
            if told.get(state.run) != state.state:
                told[state.run] = state.state
                print(f"{state.run.name}: {state.state}{f' ({state.reason})' if state.reason else ''}", flush=True)
        if all(state.state in ENDED for state in states):
            print(result_table(states, grid))
            return 0 if all(state.state == "done" for state in states) else 1
        time.sleep(_EVERY)


def cancel(run: Path) -> None:
    """End a run's job, or all of a sweep's.

    Raises:
        UserError: Nothing runs, or it runs where it cannot be reached from here.
    """
    from launch.status.follow import Local
    from launch.status.state import ENDED

    recorded = _recorded(run)
    job = _job(recorded)
    if isinstance(job, Local):
        _cancel_here(run, recorded, job)
        return
    ids = [recorded.submission.id]
    if recorded.submission.members:  # one may have been submitted again on its own
        alive = [state.recorded for state in member_states(run) if state.recorded and state.state not in ENDED]
        ids = [each.submission.id for each in alive] or ids
    try:
        answer = subprocess.run(["scancel", *ids], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"{run}: job {ids[0]} is SLURM's, and there is no scancel here: do that where SLURM is"
        ) from None
    named = f"job {', '.join(ids)}"
    if complaint := " ".join(answer.stderr.split()):
        raise UserError(f"{run}: {named} cannot be cancelled: {complaint}")
    print(f"{run}: {named} is being ended; the ranks save first")


def _cancel_here(run: Path, recorded: "Recorded", job: "Local") -> None:
    """Ask the ranks of this machine to save and leave; end by force those that have not after a while."""
    if not job.alive():
        raise UserError(f"{run}: job {job.id} has ended already")
    job.signal_ranks(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while job.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    saved = not job.alive()
    job.end()
    print(f"{run}: job {job.id} ended" + ("" if saved else f"; after {_GRACE:.0f} s its ranks were killed"))


def resume(run: Path) -> int:
    """Submit a run's recorded command again, from where it was given, in the same folder.

    Returns:
        The exit code of `launch/submit.py`.

    Raises:
        UserError: The place of the command is gone.
    """
    recorded = _recorded(run)
    submission = recorded.submission
    if not Path(submission.directory).is_dir():
        raise UserError(f"{submission.directory}, where the command was given, is gone: submit again from elsewhere")
    command = _alone(recorded.folder / "config.yaml") if submission.member else submission.command
    script = Path(__file__).resolve().with_name("submit.py")
    words = [sys.executable, str(script), *command, "--run", str(run.resolve())]
    return subprocess.run(words, cwd=submission.directory).returncode


def _alone(config: Path) -> list[str]:
    """A command for a member of a sweep, whose own would submit all of it: the same configuration, the same resources.

    What the launch section says is given as words, so that no profile fills it in anew.
    """
    from toolkit.config.load import read_yaml

    asked = read_yaml(config).get("launch") or {}
    words = [f"--launch.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in asked.items()]
    return ["--config", str(config), *words]


def _recorded(run: Path) -> "Recorded":
    from launch.record import newest

    last = newest(run)
    if last is None:
        raise UserError(f"{run}: no submission is recorded there (no logs/*/submission.json)")
    return last


def _job(recorded: "Recorded") -> "Local | Slurm":
    """A recorded job as something to follow and to end.

    Raises:
        UserError: It is another machine's.
    """
    from launch.status.follow import Controller, Local, Slurm

    submission = recorded.submission
    if submission.cluster == "slurm":
        return Slurm(submission.id)
    if submission.host != os.uname().nodename:
        raise UserError(f"{submission.run}: this job is of {submission.host}: do that there")
    return Local(Controller(submission.job, recorded.folder), recorded.folder, submission.ranks)


def cli() -> None:
    """Entry point of the console command: print a `UserError` as one line, and exit with its code."""
    run_main(main)


if __name__ == "__main__":
    cli()
