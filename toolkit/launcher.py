"""Detection of several processes without rank variables, each of which would train alone."""

import sys
from collections.abc import Mapping

from shards.errors import UserError

# Variables with the number of processes and the rank of this one: srun, Open MPI, MPICH and Intel MPI, MVAPICH2.
_STARTERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
    "mpirun_rsh": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
}


def check_alone(environment: Mapping[str, str]) -> None:
    """Check that a process without RANK is the only one.

    Args:
        environment: Environment of the process. Variables of a batch script or salloc do not count: one process may
            run there.

    Raises:
        UserError: It is one of several.
        SystemExit: It is one of several and not the first, which prints the error.
    """
    if "RANK" in environment:
        return
    for starter, (size, rank) in _STARTERS.items():
        count = environment.get(size, "")
        if count.isdigit() and int(count) > 1:
            if environment.get(rank, "0") != "0":
                sys.exit(UserError.code)
            raise UserError(
                f"{starter} started {count} processes without RANK and WORLD_SIZE, and each would run alone: "
                "start them with python launch/submit.py, or one torchrun a node "
                "(srun --ntasks-per-node 1 torchrun --nnodes N --nproc_per_node GPUS --rdzv_backend c10d "
                "--rdzv_endpoint HOST:PORT -- toolkit/train.py ...)"
            )
