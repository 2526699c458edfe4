"""Compare a job with the limits of its partition, and of QOS, user and account in SLURM's accounting.

sbatch accepts a job above most of these limits, and the job is never started.
"""

import getpass
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from launch.executor import JobSpec, cores_per_rank, minutes
from launch.slurm import client
from shards.errors import UserError
from toolkit.config.schema import gpu_count

_QOS = ("name", "flags", "maxwall", "maxtresperjob", "maxtresperuser", "maxtresperaccount", "grptres")
_ASSOCIATION = ("user", "partition", "parentname", "defaultqos", "maxwall", "maxtresperjob", "grptres")
# Columns of limits on resources, and whose they are.
_TRES = {"maxtresperjob": "a job", "maxtresperuser": "a user", "maxtresperaccount": "an account", "grptres": "all jobs"}
_OPTIONS = {"node": "--nodes", "cpu": "--nodes, --ranks-per-node or --cpus-per-rank"}
# States of nodes that jobs run on, or that SLURM powers up for them.
_USABLE = re.compile(r"(idle|mixed|allocated|completing|planned|powering_up|powered_down|powering_down)[~#%+-]?")
_MAX_DEPTH = 20  # levels of accounts above an account


@dataclass(frozen=True)
class Limits:
    """Limits in one row of the accounting.

    Attributes:
        source: Owner of the limits, for messages.
        wall: Maximum time of a job, in SLURM's notation; empty for none.
        flags: Flags of a QOS.
        tres: Limit by column and trackable resource, such as ("grptres", "gres/gpu").
    """

    source: str
    wall: str = ""
    flags: frozenset[str] = frozenset()
    tres: dict[tuple[str, str], int] = field(default_factory=dict)


def requested_partitions(spec: JobSpec, known: dict[str, dict[str, str]]) -> list[str]:
    """Return the names of the partitions that a job may run in: the requested ones, else the default one.

    Raises:
        UserError: SLURM has no partition of a name, or no default one.
    """
    names = [name for name, entry in known.items() if entry.get("Default") == "YES"]
    if spec.config.launch.partition:
        names = spec.config.launch.partition.split(",")
    shown = ", ".join(sorted(known))
    if not names:
        raise UserError(f"SLURM has no default partition: set --partition to one of {shown}")
    for name in names:
        if name not in known:
            raise UserError(f"--partition {name}: SLURM has no such partition; there are {shown}")
    return names


def partition_problem(partition: dict[str, str], spec: JobSpec) -> str | None:
    """Return why a job cannot run in a partition; None if it can. A QOS may lift limits of the partition."""
    launch = spec.config.launch
    if (state := partition.get("State", "UP")) != "UP":
        return f"is {state}: choose another with --partition"
    problems = list(_partition_limits(partition, launch.nodes, launch.time))
    flags = qos_limits(launch.qos).flags if problems and launch.qos else frozenset()
    return next((problem for flag, problem in problems if flag not in flags), None)


def limits_problem(partition: dict[str, str], spec: JobSpec) -> str | None:
    """Return the limit of the accounting that a job in a partition exceeds; None for none.

    Of several limits on the same resource the first counts: the partition's QOS, the job's, the user's, the accounts'.
    """
    partition_qos = partition.get("QoS", "N/A")
    account = spec.config.launch.account
    if not account:
        users = client.accounting_rows("user", ("defaultaccount",), f"where name={getpass.getuser()}")
        account = users[0]["defaultaccount"] if users else ""
    chain = [*_associations(account, partition["PartitionName"])] if account else []
    job_qos = qos_limits(spec.config.launch.qos or next((each[1] for each in chain if each[1]), "") or "normal")
    of_qos = [qos_limits(partition_qos)] if partition_qos != "N/A" else []
    of_qos.insert(0 if "OverPartQOS" in job_qos.flags else len(of_qos), job_qos)
    return _first_problem([*of_qos, *(limits for limits, _ in chain)], spec)


def enforced() -> bool:
    """Return whether SLURM enforces the limits of its accounting."""
    words = (client.slurm_config() or {}).get("AccountingStorageEnforce", "")
    return bool({"limits", "safe", "all"} & set(words.split(",")))


def unavailable_nodes(partitions: list[str]) -> list[str]:
    """Return nodes of some partitions, or of the default one, that are down, drained or not responding.

    Args:
        partitions: Names, separated by commas within an entry; empty for the default partition.
    """
    nodes = [
        node
        for node, name, state in client.node_states(partitions)
        if (partitions or "*" in name) and not _USABLE.fullmatch(state)
    ]
    return list(dict.fromkeys(nodes))


def names(kind: str) -> list[str]:
    """Return the names of all accounts or QOS, in lower case as SLURM compares them; empty without accounting.

    Args:
        kind: "account" or "qos".
    """
    column = {"account": "account", "qos": "name"}[kind]  # an account's column `name` is blank
    return sorted({row[column].lower() for row in client.accounting_rows(kind, (column,)) if row[column]})


def qos_limits(name: str) -> Limits:
    """Return the limits of a QOS; none for an unknown one, or for several, of which SLURM chooses."""
    rows = client.accounting_rows("qos", _QOS, f"where name={name}")
    return _limits(f"QOS {name}", rows[0]) if len(rows) == 1 else Limits(f"QOS {name}")


def _limits(source: str, row: dict[str, str]) -> Limits:
    tres = {}
    for column in _TRES:
        for entry in row.get(column, "").split(","):
            name, _, number = entry.partition("=")
            if number.isdecimal():  # memory has a unit, and is set by the user
                tres[column, name] = int(number)
    return Limits(source, row["maxwall"], frozenset(row.get("flags", "").split(",")), tres)


def _associations(account: str, partition: str) -> Iterator[tuple[Limits, str]]:
    """Yield limits and default QOS of the user with an account, of the account, and of those above it."""
    user, cluster = getpass.getuser(), (client.slurm_config() or {}).get("ClusterName", "")
    for _ in range(_MAX_DEPTH):
        rows = client.accounting_rows("association", _ASSOCIATION, f"where account={account}", f"cluster={cluster}")
        own = [row for row in rows if row["user"] == user and row["partition"] in ("", partition)]
        for row in sorted(own, key=lambda row: row["partition"] == "")[:1]:
            yield _limits(f"user {user} with account {account}", row), row["defaultqos"]
        above = [row for row in rows if not row["user"]]
        for row in above[:1]:
            yield _limits(f"account {account}", row), row["defaultqos"]
        account = above[0]["parentname"] if above else ""
        if not account:
            return


def _partition_limits(partition: dict[str, str], nodes: int, time: str) -> Iterator[tuple[str, str]]:
    """Yield the limits of a partition that a job violates, each with the flag of a QOS that lifts it."""
    for key, flag in (("TotalNodes", ""), ("MaxNodes", "PartitionMaxNodes")):
        value = partition.get(key, "UNLIMITED")
        if value.isdecimal() and int(value) < nodes:
            yield flag or key, f"allows at most {value} nodes a job, --nodes is {nodes}"
    least = partition.get("MinNodes", "0")
    if least.isdecimal() and int(least) > nodes:
        yield "PartitionMinNodes", f"allows at least {least} nodes a job, --nodes is {nodes}"
    longest = partition.get("MaxTime", "UNLIMITED")
    if longest[:1].isdecimal() and minutes(longest) < minutes(time):
        yield "PartitionTimeLimit", f"limits a job to {longest}, --time is {time}"


def _first_problem(sources: list[Limits], spec: JobSpec) -> str | None:
    launch, requested = spec.config.launch, _requested(spec)
    wall = next((limits for limits in sources if limits.wall), None)
    if wall is not None and wall.wall[:1].isdecimal() and minutes(wall.wall) < minutes(launch.time):
        return f"{wall.source} limits a job to {wall.wall}, --time is {launch.time}"
    seen = set()
    for limits in sources:
        for (column, name), limit in limits.tres.items():
            if (column, name) in seen:
                continue
            seen.add((column, name))
            if requested.get(name, 0) > limit:
                problem = (
                    f"{limits.source} limits {_TRES[column]} to {name}={limit}, this job requests {requested[name]}"
                )
                return f"{problem}: set {_OPTIONS.get(name, '--nodes or --gpus-per-node')}"
    return None


def _requested(spec: JobSpec) -> dict[str, int]:
    """Return the resources of a job by the accounting's names."""
    launch = spec.config.launch
    gpus, kind = launch.nodes * gpu_count(launch.gpus_per_node), str(launch.gpus_per_node).rpartition(":")[0]
    cores = launch.nodes * spec.ranks_per_node * cores_per_rank(spec.config)
    return {"node": launch.nodes, "cpu": cores, "gres/gpu": gpus, f"gres/gpu:{kind}": gpus}
