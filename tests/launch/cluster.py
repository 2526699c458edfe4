"""Stubs of SLURM's commands for tests without SLURM: scripts with recorded output."""

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch.executor import JobSpec
from launch.preflight import checks
from launch.profiles import Profile
from toolkit.config.schema import Config, Launch

# SubmissionRecord from SLURM 22.05, shortened.
PARTITIONS = """\
PartitionName=low AllowAccounts=ALL Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=5 TRES=cpu=20
PartitionName=short AllowAccounts=ALL Default=NO MaxNodes=2 MaxTime=01:00:00 State=UP TotalNodes=5 TRES=cpu=20
PartitionName=broken AllowAccounts=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=DOWN TotalNodes=5
"""
# Tables of sacctmgr, with the columns that it has.
TABLES = {
    "account": "account\nroot\nspeech\n",
    "qos": "name|flags|maxwall|maxtresperjob|maxtresperuser|maxtresperaccount|grptres\nnormal||||||\n",
    "user": "name|defaultaccount\nroot|root\n",
    "association": "cluster|account|user|partition|parentname|defaultqos|maxwall|maxtresperjob|grptres\n"
    "testbed|root|||||||\ntestbed|root|root||||||\ntestbed|speech|||root||||\ntestbed|speech|root||||||\n",
}
SCRIPTS = {
    "scontrol": """
        case "$*" in
        "show config")
            echo "AccountingStorageEnforce = $STUB_ENFORCE"
            echo "ClusterName             = $STUB_CLUSTER";;
        "show partition --oneliner") cat "$STUB/partitions";;
        *) exit 1;;
        esac
    """,
    # Of a column that an entity does not have sacctmgr prints blanks.
    "sacctmgr": r"""
        for word; do
            case $word in
            account | qos | user | association) entity=$word;;
            format=*) columns=${word#format=};;
            *=*) wanted="$wanted $word";;
            esac
        done
        [ -f "$STUB/$entity" ] || exit 1
        awk -F'|' -v columns="$columns" -v wanted="$wanted" '
            BEGIN { n = split(columns, names, ","); m = split(wanted, tests, " ") }
            NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
            {
                for (i = 1; i <= m; i++) {
                    split(tests[i], pair, "=")
                    if (pair[1] in at && tolower($(at[pair[1]])) != tolower(pair[2])) next
                }
                line = ""
                for (i = 1; i <= n; i++) line = line (i > 1 ? "|" : "") (names[i] in at ? $(at[names[i]]) : "")
                print line
            }' "$STUB/$entity"
    """,
    "sbatch": """
        if [ "$1" = --test-only ]; then
            cp "$2" "$STUB/tested"
            what="using 8 processors on nodes node[1-4] in partition low"
            echo "sbatch: Job 8 to start at 2026-01-01T00:00:00 $what" >&2
            exit 0
        fi
        cp "$1" "$STUB/submitted"
        echo "Submitted batch job 7"
    """,
    "srun": "exit 1",
    "squeue": "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
    "sinfo": 'for i in 1 2 3 4 5; do echo "node$i|low*|idle"; done',
    "scancel": "exit 0",
}


def write_commands(folder: Path, scripts: Mapping[str, str]) -> None:
    """Write scripts of bash under the names of SLURM's commands."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{textwrap.dedent(text)}\n")
        (folder / name).chmod(0o755)


def fake_slurm(folder: Path, cluster: str = "nowhere", enforce: str = "none") -> dict[str, str]:
    """Write the commands; returns the environment in which they are found.

    The scripts that were submitted and tested are in the folder as `submitted` and `tested`.
    """
    write_commands(folder, SCRIPTS)
    for name, table in {"partitions": PARTITIONS, **TABLES}.items():
        (folder / name).write_text(table)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "STUB": str(folder),
        "STUB_CLUSTER": cluster,
        "STUB_ENFORCE": enforce,
    }


def use_fake_slurm(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> None:
    """Write the commands, and let this process find them; options as of `fake_slurm`."""
    for name, value in fake_slurm(folder, *options).items():
        monkeypatch.setenv(name, value)


def job_spec(ranks: int = 1, **launch: object) -> JobSpec:
    """A job of ten minutes and one core a rank, unless the options differ."""
    options = {"time": "10", "cpus_per_rank": 1, **launch}
    return JobSpec("slurm", Config(launch=Launch(**options)), Profile(), ranks)  # type: ignore[arg-type]


def check_limits(**launch: object) -> str:
    """Check the limits of the partition, then those of the accounting."""
    checks.check_partition(job_spec(**launch))  # type: ignore[arg-type]
    return checks.check_limits(job_spec(**launch))  # type: ignore[arg-type]
