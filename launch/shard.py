"""Shard a corpus by a job array, a part each, and a last job that closes the folder: as make_shards, with --parts N.

    python launch/shard.py spokencoco --root DIR --out DIR --parts 16 --jobs 8 --partition cpu

Where there is no SLURM the parts are written here, one after another. The same command goes on with what is missing.
"""

import os
import shlex
import subprocess
import sys
import time
from argparse import BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the script's own folder is not a place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shards.errors import Parser, UserError, run_main

_LIMIT = "12:00:00"
_JOBS = 4  # processes a part on a cluster, and cores that are asked for it
_MOST = 10_000
_EVERY = 2.0  # seconds between two looks at the queue
_LATE = 15.0  # seconds that a shared disk may take to show the last files of a job that is gone
_TAIL = 20  # lines of a failed part's log that are shown


@dataclass(frozen=True)
class Scripts:
    """What sbatch is given, and where it leaves its traces."""

    parts: str
    merge: str
    folder: Path
    count: int

    def log(self, job: str) -> Path:
        """Output of a part, by its number, or of "merge"."""
        return self.folder / f"{job}.log"

    def code(self, job: str) -> int | None:
        """Exit code that it has left; None so far."""
        try:
            return int((self.folder / f"{job}.exit").read_text())
        except (OSError, ValueError):
            return None


def build_parser() -> Parser:
    """The command line; what it does not know is for make_shards."""
    parser = Parser(
        prog="shard.py",
        usage="%(prog)s CORPUS --root DIR --out DIR --parts N [options of make_shards.py CORPUS] [options]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--parts", type=int, required=True, metavar="N", help="parts to divide the corpus into")
    add("--array", type=int, default=0, metavar="K", help="parts at once at most (default: as many as fit)")
    add("--cluster", choices=("auto", "slurm", "local"), default="auto", help="default: SLURM where it is")
    add("--profile", help="a name in slurm/profiles or a file (default: the one that fits this cluster)")
    for name in ("partition", "account", "qos", "constraint"):
        add(f"--{name}", help="as of sbatch")
    add("--time", help=f"limit of a part, as sbatch takes it (default: {_LIMIT})")
    add("--follow", action=BooleanOptionalAction, default=True, help="wait until all is done")
    add("--dry-run", action="store_true", help="show what would be written and submitted")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the parts and merge them.

    Raises:
        UserError: An option or the cluster does not fit.
        SystemExit: With 0 once the shards are there, else the exit code of the part that failed first.
    """
    from launch.executor import choose_cluster, leave_job
    from launch.snapshot import ROOT
    from toolkit.config.schema import Launch

    options, words = build_parser().parse_known_args(arguments)
    if not 1 <= options.parts <= _MOST:
        raise UserError(f"--parts {options.parts}: expected 1 to {_MOST}")
    if options.array < 0:
        raise UserError(f"--array {options.array}: expected a number of parts, or 0")
    taken = check_words(words)
    out = taken.out
    cluster = choose_cluster(Launch(cluster=options.cluster))
    if cluster == "slurm":
        leave_job(os.environ)
    make_shards = [sys.executable, str(ROOT / "toolkit" / "make_shards.py")]
    if options.dry_run:
        code = subprocess.run([*make_shards, *words, "--dry-run"]).returncode
        if cluster == "slurm" and code == 0:
            print(_shown(scripts(options, words, taken, log_root(out) / "TIME", ROOT)))
        sys.exit(code)
    if (out / "manifest.json").exists():  # finished, or other shards: make_shards says
        sys.exit(subprocess.run([*make_shards, *words]).returncode)
    sys.exit(on_slurm(options, words, taken) if cluster == "slurm" else here(make_shards, words, out, options.parts))


def check_words(words: Sequence[str]) -> Namespace:
    """Have make_shards' own command line look at its words.

    Returns:
        What it makes of them.

    Raises:
        UserError: It does not take them, or they are at odds with parts.
    """
    from toolkit.make_shards import build_parser as parser_of_make_shards

    taken = parser_of_make_shards().parse_args(words)
    if taken.corpus == "merge":
        raise UserError("merge: the parts are merged by themselves; name a corpus")
    for name, mend in {"part": "give --parts N", "restart": f"remove {taken.out} instead"}.items():
        if getattr(taken, name):
            raise UserError(f"--{name} is for make_shards.py alone: {mend}")
    return taken


def here(make_shards: Sequence[str], words: Sequence[str], out: Path, parts: int) -> int:
    """Write the parts on this machine, one after another, and merge them.

    Returns:
        0, or the exit code of the first that failed.
    """
    each = [[*words, "--part", f"{part}/{parts}"] for part in range(1, parts + 1)]
    for command in [*each, ["merge", "--out", str(out)]]:
        if code := subprocess.run([*make_shards, *command]).returncode:
            return code
    return 0


def on_slurm(options: Namespace, words: Sequence[str], taken: Namespace) -> int:
    """Submit the parts and the merge, and wait for them.

    Returns:
        0 once the shards are there, or if they are not to be waited for; else the exit code of the first that failed.

    Raises:
        UserError: SLURM refuses a job.
    """
    from launch.snapshot import snapshot
    from launch.submit import new_folder

    root = log_root(taken.out)
    code = snapshot(root)
    made = scripts(options, words, taken, new_folder(root), code)
    parts = _sbatch(made.parts, made.folder / "parts.sh")
    try:
        merge = _sbatch(made.merge, made.folder / "merge.sh", [f"--dependency=afterok:{parts}"])
    except UserError:
        subprocess.run(["scancel", parts], capture_output=True)
        raise
    print(f"jobs {parts} ({made.count} parts) and {merge} (merge), logs {made.folder}", flush=True)
    if not options.follow:
        return 0
    try:
        return follow(made, parts, merge)
    except KeyboardInterrupt:
        print(f"the jobs go on; scancel {parts} {merge} ends them", file=sys.stderr)
        raise


def scripts(options: Namespace, words: Sequence[str], taken: Namespace, folder: Path, code: Path) -> Scripts:
    """The two batch scripts.

    Args:
        options: Of this command.
        words: For make_shards.
        taken: What make_shards makes of them.
        folder: For logs.
        code: Holds the packages that the nodes run.
    """
    from launch.slurm.sbatch_options import beside, flag

    jobs = taken.jobs if any(word.partition("=")[0] == "--jobs" for word in words) else _JOBS
    limit = f"%{options.array}" if options.array else ""
    common = {"job-name": f"shards-{taken.out.name}", "open-mode": "append", "requeue": True}
    asked, setup, python = _asked(options)
    command = f"{python} -u {shlex.quote(str(code / 'toolkit' / 'make_shards.py'))}"
    array = {"array": f"1-{options.parts}{limit}", "cpus-per-task": jobs, "output": f"{folder}/%a.log"}
    part = f'{shlex.join([*words, "--jobs", str(jobs)])} --part "$SLURM_ARRAY_TASK_ID/{options.parts}"'
    last = {"kill-on-invalid-dep": "yes", "output": f"{folder}/merge.log"}
    merge = f"merge --out {shlex.quote(str(taken.out))}"

    def script(head: dict[str, Any], job: str, arguments: str) -> str:
        mark = f'{shlex.quote(str(folder))}/"{job}".exit'
        body = [f"rm -f {mark}", f"{command} {arguments}", "code=$?", f"echo $code > {mark}", "exit $code", ""]
        flags = [flag(name, value) for name, value in beside({**common, **head}, asked).items()]
        return "\n".join(["#!/bin/bash", *flags, *setup, *body])

    return Scripts(script(array, "$SLURM_ARRAY_TASK_ID", part), script(last, "merge", merge), folder, options.parts)


def _asked(options: Namespace) -> tuple[dict[str, Any], list[str], str]:
    """What both jobs ask of SLURM, the lines before their command, and their python, by options and profile."""
    from launch.executor import minutes
    from launch.profiles import apply_profile, find_profile
    from launch.slurm.sbatch_options import with_gpus
    from toolkit.config.schema import Config, Launch

    names = ("profile", "partition", "account", "qos", "constraint", "time")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    launch = Launch(**given)
    profile = find_profile(launch)
    launch = apply_profile(Config(launch=launch), profile, [f"launch.{name}" for name in given]).launch
    limit = _LIMIT if launch.time == Launch().time and "time" not in given else launch.time
    asked = {name: getattr(launch, name) for name in names[1:-1]} | {"time": minutes(limit)}
    asked |= with_gpus(profile.sbatch, None, 1)  # parts need none
    python = shlex.quote(sys.executable)
    if profile.container or not profile.contained:  # one of srun's, which these scripts do not call, is for ranks alone
        python = profile.python or ("python" if profile.container else python)
    return (
        {name: value for name, value in asked.items() if value is not None},
        [*profile.setup, *(f"export {name}={shlex.quote(str(value))}" for name, value in profile.env.items())],
        f"{profile.container} {python}" if profile.container else python,
    )


def follow(made: Scripts, parts: str, merge: str) -> int:
    """Say how many parts are done until the merge has ended.

    Returns:
        0, or the exit code of the first that failed.
    """
    from launch.slurm.client import find

    names = [str(number) for number in range(1, made.count + 1)]
    told, gone_at = "", None
    while True:
        found = find([*(f"{parts}_{name}" for name in names), merge])
        codes = {name: made.code(name) for name in [*names, "merge"]}
        done, failed = sum(codes[name] == 0 for name in names), [name for name in codes if codes[name]]
        line = f"{done} of {made.count} parts written" + (f", failed: {', '.join(failed)}" if failed else "")
        if line != told:
            print(line, flush=True)
            told = line
        if codes["merge"] == 0:
            print(made.log("merge").read_text(errors="replace"), end="")
            return 0
        alive = not found or any(each.alive for each in found.values())
        gone_at = None if alive else gone_at or time.monotonic()
        if gone_at is not None and (failed or time.monotonic() - gone_at > _LATE):
            return _explain(made, codes)
        time.sleep(_EVERY)


def _explain(made: Scripts, codes: dict[str, int | None]) -> int:
    """Say why there are no shards: by the end of the first log of one that failed."""
    job = next((name for name, code in codes.items() if code), None)
    job = job or next(name for name, code in codes.items() if code is None)
    log, code = made.log(job), codes[job]
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    what = "the merge" if job == "merge" else f"part {job}"
    mistakes = [line for line in lines if line.startswith("error: ")]
    if code == 2 and mistakes:
        print(mistakes[-1], file=sys.stderr)
        return 2
    how = "was killed or never began" if code is None else f"failed with exit code {code}"
    print("\n".join(lines[-_TAIL:]), file=sys.stderr)
    print(f"error: {what} {how}; the same command goes on with what is missing; its log is {log}", file=sys.stderr)
    return code or 1


def log_root(out: Path) -> Path:
    """Folder for logs and code beside the shards, which hold nothing else."""
    return out.resolve().with_name(f"{out.name}.logs")


def _sbatch(script: str, path: Path, options: Sequence[str] = ()) -> str:
    """Submit a script.

    Returns:
        The job's number.

    Raises:
        UserError: SLURM refuses it.
    """
    path.write_text(script, encoding="utf-8")
    from launch.slurm.client import job_number

    answer = subprocess.run(["sbatch", "--parsable", *options, str(path)], capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"SLURM refused the job: {' '.join(answer.stderr.split())}")
    return job_number(answer.stdout)


def _shown(made: Scripts) -> str:
    return f"\nthe parts:\n\n{made.parts}\nthe merge, once all have ended well:\n\n{made.merge}"


if __name__ == "__main__":
    run_main(main)
