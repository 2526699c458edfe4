"""Several processes that nobody told of one another do not train alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import UserError
from toolkit.launcher import check_alone

ROOT = Path(__file__).resolve().parents[2]
STARTERS = [
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpiexec", "PMI_SIZE", "PMI_RANK"),
    ("mpirun_rsh", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
]


@pytest.mark.parametrize(("starter", "size", "rank"), STARTERS)
def test_several_are_refused_in_one_line(starter, size, rank):
    with pytest.raises(
        UserError, match=rf"^{starter} started 4 processes without RANK .* launch/submit\.py.* torchrun"
    ):
        check_alone({size: "4", rank: "0"})
    with pytest.raises(SystemExit) as ended:
        check_alone({size: "4", rank: "2"})
    assert ended.value.code == 2
    check_alone({size: "1", rank: "0"})
    check_alone({size: "4", rank: "2", "RANK": "2", "WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"},  # salloc
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_TASK_PID": "17"},  # a batch script
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash, in an allocation
    ],
)
def test_one_in_an_allocation_may_be_alone(environment):
    check_alone(environment)


def test_a_training_of_each_task_says_so(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = [sys.executable, str(ROOT / "toolkit" / "train.py"), "--run", str(tmp_path / "run")]
    started = [
        subprocess.Popen(command, env={**environment, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": rank}, stderr=-1)
        for rank in "01"
    ]
    told = [process.communicate()[1].decode() for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert told[0].startswith("error: srun started 2 processes")
    assert (told[0].count("\n"), told[1]) == (1, "")
    assert not (tmp_path / "run").exists()


def test_all_that_join_a_group_are_asked(monkeypatch):
    from toolkit.distributed import init_distributed

    monkeypatch.setattr(os, "environ", {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"})
    with pytest.raises(UserError, match="srun started 2 processes"):
        init_distributed()
