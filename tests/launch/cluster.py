"""SLURM's commands as far as a submission needs them, for tests without SLURM: scripts that say what SLURM said."""

import os
import textwrap
from pathlib import Path

# Recorded from SLURM 22.05, shortened.
PARTITIONS = """\
PartitionName=low AllowAccounts=ALL Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=5 TRES=cpu=20
PartitionName=short AllowAccounts=ALL Default=NO MaxNodes=2 MaxTime=01:00:00 State=UP TotalNodes=5 TRES=cpu=20
PartitionName=broken AllowAccounts=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=DOWN TotalNodes=5
"""
SCRIPTS = {
    "scontrol": """
        case "$*" in
        "show config") echo "ClusterName             = $STUB_CLUSTER";;
        "show partition --oneliner") cat "$STUB/partitions";;
        *) exit 1;;
        esac
    """,
    "sacctmgr": """
        case "$*" in
        *"list account format=account") printf 'root\\nspeech\\n';;
        *"list account format="*) printf '\\n\\n';;  # a column that accounts do not have
        *"list qos format=name") echo normal;;
        *) exit 1;;
        esac
    """,
    "sbatch": """
        if [ "$1" = --test-only ]; then
            cp "$2" "$STUB/tested"
            echo "sbatch: Job 8 to start at 2026-01-01T00:00:00 using 8 processors on nodes node[1-4]" >&2
            exit 0
        fi
        cp "$1" "$STUB/submitted"
        echo "Submitted batch job 7"
    """,
    "srun": "exit 1",
    "squeue": "exit 0",
    "scancel": "exit 0",
}


def fake_slurm(folder: Path, cluster: str = "nowhere") -> dict[str, str]:
    """Write the commands; returns the environment in which they are found.

    What was submitted or tested lies in the folder as `submitted` and `tested`.
    """
    folder.mkdir()
    (folder / "partitions").write_text(PARTITIONS)
    for name, text in SCRIPTS.items():
        (folder / name).write_text("#!/bin/bash\n" + textwrap.dedent(text))
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "STUB": str(folder), "STUB_CLUSTER": cluster}
