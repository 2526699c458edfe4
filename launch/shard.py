"""Shard a corpus in parallel: a SLURM job array writes the parts, a last job merges them.

    python launch/shard.py spokencoco --root DIR --out DIR --parts 16 --jobs 8 --partition cpu

Without SLURM the parts are written on this machine, one after another. The same command continues an unfinished folder.
"""

import logging
import os
import shlex
import subprocess
import sys
import time
from argparse import BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the script's own folder is not a place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.executor import choose_cluster, environment_lines, leave_job, minutes
from launch.profiles import apply_profile, find_profile
from launch.slurm.client import cancel_jobs, find_jobs, submit_script
from launch.slurm.sbatch_options import directive, merge_options, with_gpus
from launch.snapshot import ROOT, snapshot
from launch.status.failure import Failure, last_lines
from launch.submit import new_folder
from shards.errors import ExitCode, Parser, UserError, run_main
from shards.logs import add_log_level, setup_logging
from toolkit.config.schema import Config, Launch

logger = logging.getLogger(__name__)

_DEFAULT_TIME = "12:00:00"
_DEFAULT_JOBS = 4  # processes and cores of a part on a cluster
_MAX_PARTS = 10_000
_POLL_INTERVAL = 2.0  # seconds between queries of the queue
_FILE_DELAY = 15.0  # seconds that a shared disk may take to show the last files of a job that has ended


def build_parser() -> Parser:
    """Return the command line; other options are make_shards'."""
    parser = Parser(
        prog="shard.py",
        usage="%(prog)s CORPUS --root DIR --out DIR --parts N [options of make_shards.py CORPUS] [options]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--parts", type=int, required=True, metavar="N", help="parts to divide the corpus into")
    add("--array", type=int, default=0, metavar="K", help="maximum number of parts at a time (default: as many as fit)")
    add("--cluster", choices=("auto", "slurm", "local"), default="auto", help="default: SLURM if it is available")
    add("--profile", help="a name in slurm/profiles or a file (default: the one that matches this cluster)")
    for name in ("partition", "account", "qos", "constraint"):
        add(f"--{name}", help="as of sbatch")
    add("--time", help=f"time limit of a part, in sbatch's notation (default: {_DEFAULT_TIME})")
    add("--follow", action=BooleanOptionalAction, default=True, help="wait for the jobs")
    add("--dry-run", action="store_true", help="show what would be written and submitted")
    add_log_level(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the parts and merge them.

    Raises:
        UserError: An option is invalid, or the cluster is not usable.
        SystemExit: With 0 once the shards are written, else the exit code of the part that failed first.
    """
    options, words = build_parser().parse_known_args(arguments)
    setup_logging(options.log_level)
    if not 1 <= options.parts <= _MAX_PARTS:
        raise UserError(f"--parts {options.parts}: expected 1 to {_MAX_PARTS}")
    if options.array < 0:
        raise UserError(f"--array {options.array}: expected a number of parts, or 0")
    if options.log_level != "info":
        words += ["--log-level", options.log_level]
    parsed = check_words(words)
    out = parsed.out
    cluster = choose_cluster(Launch(cluster=options.cluster))
    if cluster == "slurm":
        leave_job(os.environ)
    make_shards = [sys.executable, str(ROOT / "toolkit" / "make_shards.py")]
    if options.dry_run:
        code = subprocess.run([*make_shards, *words, "--dry-run"]).returncode
        if cluster == "slurm" and code == 0:
            parts, merge = scripts(options, words, parsed, log_root(out) / "TIME", ROOT)
            print(f"\nthe parts:\n\n{parts}\nthe merge, once all have succeeded:\n\n{merge}")
        sys.exit(code)
    if (out / "manifest.json").exists():  # finished, or other shards: make_shards reports it
        sys.exit(subprocess.run([*make_shards, *words]).returncode)
    sys.exit(on_slurm(options, words, parsed) if cluster == "slurm" else here(make_shards, words, out, options.parts))


def check_words(words: Sequence[str]) -> Namespace:
    """Parse the options of make_shards.

    Returns:
        Parsed options.

    Raises:
        UserError: One is invalid, or contradicts --parts.
    """
    from toolkit.make_shards import build_parser as parser_of_make_shards  # numpy, which slows --help down

    parsed = parser_of_make_shards().parse_args(words)
    if parsed.corpus == "merge":
        raise UserError("merge: the parts are merged automatically; name a corpus")
    for name, instead in {"part": "give --parts N", "restart": f"remove {parsed.out} instead"}.items():
        if getattr(parsed, name):
            raise UserError(f"--{name} is for make_shards.py alone: {instead}")
    return parsed


def here(make_shards: Sequence[str], words: Sequence[str], out: Path, parts: int) -> int:
    """Write the parts on this machine, one after another, and merge them.

    Returns:
        0, or the exit code of the first that failed.
    """
    commands = [[*words, "--part", f"{part}/{parts}"] for part in range(1, parts + 1)]
    for command in [*commands, ["merge", "--out", str(out)]]:
        if code := subprocess.run([*make_shards, *command]).returncode:
            return code
    return 0


def on_slurm(options: Namespace, words: Sequence[str], parsed: Namespace) -> int:
    """Submit the parts and the merge, and wait for them.

    Returns:
        0 once the shards are written, or without waiting; else the exit code of the first job that failed.

    Raises:
        UserError: SLURM refuses a job.
    """
    root = log_root(parsed.out)
    code, folder = snapshot(root), new_folder(root)
    files = folder / "parts.sh", folder / "merge.sh"
    for file, text in zip(files, scripts(options, words, parsed, folder, code), strict=True):
        file.write_text(text, encoding="utf-8")
    parts = submit_script(files[0])
    try:
        merge = submit_script(files[1], [f"--dependency=afterok:{parts}"])
    except UserError:
        cancel_jobs([parts])
        raise
    logger.info("jobs %s (%d parts) and %s (merge), logs %s", parts, options.parts, merge, folder)
    if not options.follow:
        return 0
    try:
        return follow(folder, options.parts, parts, merge)
    except KeyboardInterrupt:
        logger.warning("the jobs are still running; scancel %s %s ends them", parts, merge)
        raise


def scripts(options: Namespace, words: Sequence[str], parsed: Namespace, folder: Path, code: Path) -> tuple[str, str]:
    """Return the batch scripts of the parts and of the merge.

    As jobs of submit's executor, parts would be steps of srun, in the container of its options, and restarted at the
    time limit.

    Args:
        options: Options of this command.
        words: Options for make_shards.
        parsed: The same, parsed.
        folder: Folder of the logs and exit codes.
        code: Folder of the packages that the nodes run.
    """
    jobs = parsed.jobs if any(word.partition("=")[0] == "--jobs" for word in words) else _DEFAULT_JOBS
    limit = f"%{options.array}" if options.array else ""
    common = {"job-name": f"shards-{parsed.out.name}", "open-mode": "append", "requeue": True}
    requested, setup, python = _resources(options)
    command = f"{python} -u {shlex.quote(str(code / 'toolkit' / 'make_shards.py'))}"

    def script(head: dict[str, Any], job: str, arguments: str) -> str:
        mark = f'{shlex.quote(str(folder))}/"{job}".exit'
        body = [f"rm -f {mark}", f"{command} {arguments}", "code=$?", f"echo $code > {mark}", "exit $code", ""]
        flags = [directive(name, value) for name, value in merge_options({**common, **head}, requested).items()]
        return "\n".join(["#!/bin/bash", *flags, *setup, *body])

    array = {"array": f"1-{options.parts}{limit}", "cpus-per-task": jobs, "output": f"{folder}/%a.log"}
    part = f'{shlex.join([*words, "--jobs", str(jobs)])} --part "$SLURM_ARRAY_TASK_ID/{options.parts}"'
    last = {"kill-on-invalid-dep": "yes", "output": f"{folder}/merge.log"}
    merge = f"merge --out {shlex.quote(str(parsed.out))}"
    return script(array, "$SLURM_ARRAY_TASK_ID", part), script(last, "merge", merge)


def _resources(options: Namespace) -> tuple[dict[str, Any], list[str], str]:
    """Return options of sbatch for both jobs, the lines before their command, and their python."""
    names = ("partition", "account", "qos", "constraint", "time")
    given = {name: value for name in (*names, "profile") if (value := getattr(options, name)) is not None}
    launch = Launch(**given)
    profile = find_profile(launch)
    launch = apply_profile(Config(launch=launch), profile, [f"launch.{name}" for name in given]).launch
    if launch.time == Launch().time and "time" not in given:
        launch.time = _DEFAULT_TIME
    requested = {name: value for name in names if (value := getattr(launch, name)) is not None}
    requested |= {"time": minutes(launch.time), **with_gpus(profile.sbatch, None, 1)}  # no GPUs
    python = shlex.quote(sys.executable)
    if profile.container or not profile.contained:  # these scripts do not call srun, nor the container of its options
        python = profile.python or ("python" if profile.container else python)
    return requested, environment_lines(profile), f"{profile.container} {python}" if profile.container else python


def follow(folder: Path, count: int, parts: str, merge: str) -> int:
    """Log how many parts are written until the merge has ended.

    Args:
        folder: Folder of the logs and exit codes.
        count: Number of parts.
        parts: Number of the job array.
        merge: Number of the last job.

    Returns:
        0, or the exit code of the first that failed.
    """
    names = [str(number) for number in range(1, count + 1)]
    shown, gone_at = "", None
    while True:
        jobs = find_jobs([*(f"{parts}_{name}" for name in names), merge])
        codes = {name: _exit_code(folder / f"{name}.exit") for name in [*names, "merge"]}
        done, failed = sum(codes[name] == 0 for name in names), [name for name in codes if codes[name]]
        line = f"{done} of {count} parts written" + (f", failed: {', '.join(failed)}" if failed else "")
        if line != shown:
            logger.info("%s", line)
            shown = line
        if codes["merge"] == 0:
            print((folder / "merge.log").read_text(errors="replace"), end="")
            return 0
        alive = not jobs or any(each.alive for each in jobs.values())
        gone_at = None if alive else gone_at or time.monotonic()
        if gone_at is not None and (failed or time.monotonic() - gone_at > _FILE_DELAY):
            job = failed[0] if failed else next(name for name, code in codes.items() if code is None)
            return _report_failure(folder / f"{job}.log", codes[job])
        time.sleep(_POLL_INTERVAL)


def _exit_code(path: Path) -> int | None:
    """Return the exit code that a job's script has written; None before its end."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _report_failure(log: Path, code: int | None) -> int:
    """Log why a part or the merge failed, with the end of its log; return its exit code."""
    failure = Failure(0, code, last_lines(log), log)
    if failure.user_error:
        logger.error("%s", failure.user_error.removeprefix("error: "))
        return ExitCode.USER_ERROR
    name = "the merge" if log.stem == "merge" else f"part {log.stem}"
    how = "was killed or never started" if code is None else f"failed with exit code {code}"
    print("\n".join(failure.lines), file=sys.stderr)
    logger.error("%s %s; the same command continues; its log is %s", name, how, log)
    return code or ExitCode.ERROR


def log_root(out: Path) -> Path:
    """Return the folder for logs and code, beside that of the shards."""
    return out.resolve().with_name(f"{out.name}.logs")


if __name__ == "__main__":
    run_main(main)
