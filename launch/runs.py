"""Manage runs: status, follow a log, cancel, resume, the table of a sweep, and one wandb run of all restarts.

A run is given by its folder. SLURM is queried if it is on this machine; else the state comes from the folder alone.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # the script's own folder is not a place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.record import SubmissionRecord, newest
from launch.slurm.client import cancel_jobs
from launch.status.follow import Controller, Local, Running, Slurm
from launch.status.follow import follow as follow_job
from launch.status.state import ENDED, RunState, find_runs, run_states
from launch.status.tables import result_table, result_values, status_table, status_values
from shards.errors import Parser, UserError, run_main
from shards.logs import add_log_level, setup_logging
from toolkit.config.yaml_files import read_yaml

logger = logging.getLogger(__name__)

_CANCEL_TIMEOUT = 120.0  # seconds that the ranks of this machine have to save when they are cancelled
_POLL_INTERVAL = 5.0  # seconds between queries of a sweep's members


def build_parser() -> Parser:
    """Return the command line, with one subcommand for each action."""
    parser = Parser(prog="runs.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_log_level(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    status = commands.add_parser(
        "status", help="state, step, time left, restarts and recall of runs, and why one failed"
    )
    status.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of them (runs)")
    status.add_argument("--json", action="store_true", help="print JSON")
    one = {
        "follow": "show a run's log as it grows, until it ends; or the states of a sweep's members",
        "cancel": "end a run's job; its ranks save first",
        "resume": "submit the recorded command again, in the same folder",
    }
    for name, line in one.items():
        commands.add_parser(name, help=line, description=line).add_argument("run", type=Path, metavar="RUN")
    table = commands.add_parser("table", help="results of a sweep so far, one row a member, and which failed")
    table.add_argument("grid", type=Path, metavar="FOLDER", help="the folder of a grid, or any folder of runs")
    table.add_argument("--json", action="store_true", help="print JSON")
    wandb = commands.add_parser("wandb", help="write a run's log, with all restarts, as one wandb run")
    wandb.add_argument("run", type=Path, metavar="RUN")
    wandb.add_argument("--mode", choices=("online", "offline"), help="default: online if an API key is found")
    wandb.add_argument("--dry-run", action="store_true", help="show what would be written, and write nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Raises:
        UserError: A folder is not a run, or the run's state does not allow the action.
        SystemExit: Exit code of the run that was followed or resumed.
    """
    options = build_parser().parse_args(arguments)
    setup_logging(options.log_level)
    if options.command == "status":
        status(options.runs or [Path("runs")], options.json)
    elif options.command == "table":
        table(options.grid, options.json)
    elif options.command == "cancel":
        cancel(options.run)
    elif options.command == "wandb":
        wandb(options.run, options.mode, options.dry_run)
    else:
        sys.exit({"follow": follow, "resume": resume}[options.command](options.run))


def status(folders: Sequence[Path], as_json: bool = False) -> None:
    """Print the states of runs."""
    runs = list(dict.fromkeys(run for folder in folders for run in find_runs(folder)))
    states = run_states(runs)
    print(json.dumps([status_values(state) for state in states], indent=1) if as_json else status_table(states))


def table(grid: Path, as_json: bool = False) -> None:
    """Print the results of a sweep so far."""
    states = member_states(grid)
    if as_json:
        print(json.dumps([result_values(state, grid) for state in states], indent=1))
    else:
        print(result_table(states, grid))


def wandb(run: Path, mode: str | None = None, dry_run: bool = False) -> None:
    """Replay a run's log into one wandb run, and print what was written.

    Raises:
        UserError: There is no log, no key for an online run, or wandb fails.
    """
    from toolkit.training.metrics.wandb_replay import replay

    done = replay(run, mode, dry_run)
    rows, starts = done.history.rows, done.history.starts
    what = f"{len(rows):,} steps from {rows[0][0]:,} to {rows[-1][0]:,}, of {starts} start{'' if starts == 1 else 's'}"
    if done.history.replaced:
        what += f" ({done.history.replaced:,} steps were done again after a restart, and count once)"
    written = "would be" if dry_run else "is now"
    print(f"{run}: {what}: {written} run {done.id} of project {done.project}, {done.mode}")
    if done.folder:
        print(f"to upload it: wandb sync {done.folder}")


def member_states(grid: Path) -> list[RunState]:
    """Return the states of a sweep's members, in its order; of another folder, of the runs in it.

    Raises:
        UserError: The folder has no runs.
    """
    last = newest(grid)
    if last and last.submission.members:
        members = last.submission.members
        return run_states([Path(members[index]).parent.parent for index in sorted(members, key=int)])
    return run_states(find_runs(grid))


def follow(run: Path) -> int:
    """Show a run's log, or the states of a sweep's members, until all have ended.

    Returns:
        Exit code of the run; of a sweep 0, or 1 if a member failed.
    """
    recorded = _recorded(run)
    if recorded.submission.members:
        return _follow_members(run)
    return follow_job(_job(recorded), recorded)


def _follow_members(grid: Path) -> int:
    shown: dict[Path, str] = {}
    while True:
        states = member_states(grid)
        for state in states:
            if shown.get(state.run) != state.state:
                shown[state.run] = state.state
                reason = f" ({state.reason})" if state.reason else ""
                logger.info("%s: %s%s", state.run.name, state.state, reason)
        if all(state.state in ENDED for state in states):
            print(result_table(states, grid))
            return 0 if all(state.state == "done" for state in states) else 1
        time.sleep(_POLL_INTERVAL)


def cancel(run: Path) -> None:
    """Cancel a run's job, or all of a sweep's.

    Raises:
        UserError: Nothing runs, or it cannot be cancelled from this machine.
    """
    recorded = _recorded(run)
    job = _job(recorded)
    if isinstance(job, Local):
        _cancel_here(run, recorded, job)
        return
    ids = [recorded.submission.id]
    if recorded.submission.members:  # one may have been resubmitted alone
        alive = [state.recorded for state in member_states(run) if state.recorded and state.state not in ENDED]
        ids = [each.submission.id for each in alive] or ids
    try:
        error = cancel_jobs(ids)
    except FileNotFoundError:
        raise UserError(
            f"{run}: job {ids[0]} is SLURM's, and there is no scancel here: cancel it where SLURM is"
        ) from None
    if error:
        raise UserError(f"{run}: job {', '.join(ids)} cannot be cancelled: {error}")
    logger.info("%s: job %s is being cancelled; the ranks save first", run, ", ".join(ids))


def _cancel_here(run: Path, recorded: SubmissionRecord, job: Local) -> None:
    """Signal the ranks of this machine to save and exit; kill them after a timeout."""
    if not job.alive():
        raise UserError(f"{run}: job {job.id} has ended already")
    job.signal_ranks(signal.SIGTERM)
    deadline = time.monotonic() + _CANCEL_TIMEOUT
    while job.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    saved = not job.alive()
    job.end()
    killed = "" if saved else f"; after {_CANCEL_TIMEOUT:.0f} s its ranks were killed"
    logger.info("%s: job %s ended%s", run, job.id, killed)


def resume(run: Path) -> int:
    """Submit a run's recorded command again, from its working directory and in the same run folder.

    Returns:
        Exit code of `launch/submit.py`.

    Raises:
        UserError: The working directory of the command does not exist.
    """
    recorded = _recorded(run)
    submission = recorded.submission
    if not Path(submission.directory).is_dir():
        raise UserError(
            f"{submission.directory}, the working directory of the command, does not exist: submit again from elsewhere"
        )
    command = _member_command(recorded.folder / "config.yaml") if submission.member else submission.command
    script = Path(__file__).resolve().with_name("submit.py")
    words = [sys.executable, str(script), *command, "--run", str(run.resolve())]
    return subprocess.run(words, cwd=submission.directory).returncode


def _member_command(config: Path) -> list[str]:
    """Return the command of a sweep's member alone, with the same configuration and resources.

    The launch section is given as options, so that no profile fills it in again.
    """
    launch = read_yaml(config).get("launch") or {}
    words = [
        f"--launch.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in launch.items()
    ]
    return ["--config", str(config), *words]


def _recorded(run: Path) -> SubmissionRecord:
    last = newest(run)
    if last is None:
        raise UserError(f"{run}: no submission is recorded there (no logs/*/submission.json)")
    return last


def _job(recorded: SubmissionRecord) -> Running:
    """Return a recorded job as one that can be followed and cancelled.

    Raises:
        UserError: It belongs to another machine.
    """
    submission = recorded.submission
    if submission.cluster == "slurm":
        return Slurm(submission.id)
    if submission.host != os.uname().nodename:
        raise UserError(f"{submission.run}: this job runs on {submission.host}: give the command there")
    return Local(Controller(submission.job, recorded.folder), recorded.folder, submission.ranks)


cli = partial(run_main, main)

if __name__ == "__main__":
    cli()
