"""Limits of a partition, and of QOS, user and account in SLURM's accounting, against what a job asks for.

sbatch takes a job that is above most of these limits, and lets it wait for ever.
"""

import getpass
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

from launch.executor import JobSpec, cores_per_rank, minutes
from launch.profiles import slurm_config
from launch.slurm.client import ask
from shards.errors import UserError
from toolkit.config.schema import gpu_count

_SACCTMGR = ("sacctmgr", "--noheader", "--parsable2", "--readonly", "list")
_QOS = ("name", "flags", "maxwall", "maxtresperjob", "maxtresperuser", "maxtresperaccount", "grptres")
_ASSOCIATION = ("user", "partition", "parentname", "defaultqos", "maxwall", "maxtresperjob", "grptres")
# Columns of limits on what jobs take, and for whom they are.
_TRES = {"maxtresperjob": "a job", "maxtresperuser": "a user", "maxtresperaccount": "an account", "grptres": "all jobs"}
_MEND = {"node": "--nodes", "cpu": "--nodes, --ranks-per-node or --cpus-per-rank"}
# States of nodes that jobs run on, or that SLURM switches on for them.
_USABLE = re.compile(r"(idle|mixed|allocated|completing|planned|powering_up|powered_down|powering_down)[~#%+-]?")
_DEEPEST = 20  # accounts above an account that are asked for


@dataclass(frozen=True)
class Limits:
    """What one line of the accounting sets.

    Attributes:
        source: Whose limits they are, for messages.
        wall: Longest time of a job, as SLURM writes it; empty for none.
        flags: Of a QOS.
        tres: What may be taken, by column and trackable resource, such as ("grptres", "gres/gpu").
    """

    source: str
    wall: str = ""
    flags: frozenset[str] = frozenset()
    tres: dict[tuple[str, str], int] = field(default_factory=dict)


def partitions() -> dict[str, dict[str, str]]:
    """All partitions by name, each with SLURM's words for what it is.

    Raises:
        UserError: SLURM does not answer.
    """
    answer = subprocess.run(["scontrol", "show", "partition", "--oneliner"], capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"SLURM does not answer: {' '.join(answer.stderr.split())}")
    lines = (line.split() for line in answer.stdout.splitlines() if "PartitionName=" in line)
    entries = (dict(word.partition("=")[::2] for word in words if "=" in word) for words in lines)
    return {entry["PartitionName"]: entry for entry in entries}


def chosen(asked: JobSpec, known: dict[str, dict[str, str]]) -> list[str]:
    """Names of the partitions that a job may run in: those asked for, else the default one.

    Raises:
        UserError: SLURM has none of a name, or no default one.
    """
    names = [name for name, entry in known.items() if entry.get("Default") == "YES"]
    if asked.config.launch.partition:
        names = asked.config.launch.partition.split(",")
    shown = ", ".join(sorted(known))
    if not names:
        raise UserError(f"SLURM has no default partition: set --partition to one of {shown}")
    for name in names:
        if name not in known:
            raise UserError(f"--partition {name}: SLURM has none of that name; there are {shown}")
    return names


def partition_problem(partition: dict[str, str], asked: JobSpec) -> str | None:
    """Why a job cannot run in a partition; None if it can. Accounting is asked for what a QOS may override."""
    launch = asked.config.launch
    if (state := partition.get("State", "UP")) != "UP":
        return f"is {state}: choose another with --partition"
    found = list(_sizes(partition, launch.nodes, launch.time))
    flags = qos_limits(launch.qos).flags if found and launch.qos else frozenset()
    return next((problem for flag, problem in found if flag not in flags), None)


def limits_problem(partition: dict[str, str], asked: JobSpec) -> str | None:
    """Which limit of the accounting a job in a partition is above; None for none.

    Of several that limit the same the first counts: the partition's QOS, the job's, the user's, and the accounts'.
    """
    partition_qos = partition.get("QoS", "N/A")
    account = asked.config.launch.account or _default_account()
    chain = [*_associations(account, partition["PartitionName"])] if account else []
    job_qos = qos_limits(asked.config.launch.qos or next((each[1] for each in chain if each[1]), "") or "normal")
    of_qos = [qos_limits(partition_qos)] if partition_qos != "N/A" else []
    of_qos.insert(0 if "OverPartQOS" in job_qos.flags else len(of_qos), job_qos)
    return _first_problem([*of_qos, *(limits for limits, _ in chain)], asked)


def enforced() -> bool:
    """Does SLURM hold jobs back that are above a limit of its accounting?"""
    words = (slurm_config() or {}).get("AccountingStorageEnforce", "")
    return bool({"limits", "safe", "all"} & set(words.split(",")))


def nodes_away(partitions: list[str]) -> list[str]:
    """Nodes of some partitions, or of the default one, that cannot be used for now: down, drained, not answering.

    Args:
        partitions: Names, several with commas between; empty for the default partition.
    """
    lines = ask(["sinfo", "--noheader", "--Node", "--format=%N|%P|%T", *(f"--partition={each}" for each in partitions)])
    entries = [line.strip().split("|") for line in lines or []]
    found = [node for node, name, state in entries if (partitions or "*" in name) and not _USABLE.fullmatch(state)]
    return list(dict.fromkeys(found))


def names(kind: str) -> list[str]:
    """The names of all accounts or QOS, in small letters as SLURM compares them; empty without accounting.

    Args:
        kind: "account" or "qos".
    """
    column = {"account": "account", "qos": "name"}[kind]  # an account's column `name` is blank
    return sorted({row[column].lower() for row in _rows(kind, (column,)) if row[column]})


def qos_limits(name: str) -> Limits:
    """Limits of a QOS; none for one that is not known, or for several, of which SLURM chooses."""
    rows = _rows("qos", _QOS, f"where name={name}")
    return _limits(f"QOS {name}", rows[0]) if len(rows) == 1 else Limits(f"QOS {name}")


def _rows(entity: str, columns: tuple[str, ...], *where: str) -> list[dict[str, str]]:
    """What sacctmgr lists, by column; empty where there is no accounting."""
    words = [word for part in where for word in part.split(" ", 1)]
    lines = ask([*_SACCTMGR, entity, *words, f"format={','.join(columns)}"]) or []
    blank = [""] * len(columns)  # for what a line lacks
    return [dict(zip(columns, [*line.strip().split("|"), *blank], strict=False)) for line in lines if line.strip()]


def _limits(source: str, row: dict[str, str]) -> Limits:
    tres = {}
    for column in _TRES:
        for entry in row.get(column, "").split(","):
            name, _, number = entry.partition("=")
            if number.isdecimal():  # memory has a unit, and is the user's to ask for
                tres[column, name] = int(number)
    return Limits(source, row["maxwall"], frozenset(row.get("flags", "").split(",")), tres)


def _default_account() -> str:
    rows = _rows("user", ("defaultaccount",), f"where name={getpass.getuser()}")
    return rows[0]["defaultaccount"] if rows else ""


def _associations(account: str, partition: str) -> Iterator[tuple[Limits, str]]:
    """Limits and default QOS of the user with an account, of the account, and of those above it."""
    user = getpass.getuser()
    for _ in range(_DEEPEST):
        rows = _rows("association", _ASSOCIATION, f"where account={account}", f"cluster={_cluster()}")
        own = [row for row in rows if row["user"] == user and row["partition"] in ("", partition)]
        for row in sorted(own, key=lambda row: row["partition"] == "")[:1]:
            yield _limits(f"user {user} with account {account}", row), row["defaultqos"]
        above = [row for row in rows if not row["user"]]
        for row in above[:1]:
            yield _limits(f"account {account}", row), row["defaultqos"]
        account = above[0]["parentname"] if above else ""
        if not account:
            return


def _cluster() -> str:
    return (slurm_config() or {}).get("ClusterName", "")


def _sizes(partition: dict[str, str], nodes: int, time: str) -> Iterator[tuple[str, str]]:
    """Limits of a partition that a job is above or below, each with the flag of a QOS that lifts it."""
    for key, flag in (("TotalNodes", ""), ("MaxNodes", "PartitionMaxNodes")):
        value = partition.get(key, "UNLIMITED")
        if value.isdecimal() and int(value) < nodes:
            yield flag or key, f"gives a job at most {value} nodes, --nodes asks for {nodes}"
    least = partition.get("MinNodes", "0")
    if least.isdecimal() and int(least) > nodes:
        yield "PartitionMinNodes", f"gives a job at least {least} nodes, --nodes asks for {nodes}"
    longest = partition.get("MaxTime", "UNLIMITED")
    if longest[:1].isdecimal() and minutes(longest) < minutes(time):
        yield "PartitionTimeLimit", f"lets a job run {longest}, --time asks for {time}"


def _first_problem(sources: list[Limits], asked: JobSpec) -> str | None:
    launch, wanted = asked.config.launch, _wanted(asked)
    wall = next((limits for limits in sources if limits.wall), None)
    if wall is not None and wall.wall[:1].isdecimal() and minutes(wall.wall) < minutes(launch.time):
        return f"{wall.source} lets a job run {wall.wall}, --time asks for {launch.time}"
    decided = set()
    for limits in sources:
        for (column, name), most in limits.tres.items():
            if (column, name) in decided:
                continue
            decided.add((column, name))
            if wanted.get(name, 0) > most:
                what = f"{limits.source} gives {_TRES[column]} at most {name}={most}, this one asks for {wanted[name]}"
                return f"{what}: set {_MEND.get(name, '--nodes or --gpus-per-node')}"
    return None


def _wanted(asked: JobSpec) -> dict[str, int]:
    """What a job takes, in the words of the accounting."""
    launch = asked.config.launch
    gpus, kind = launch.nodes * gpu_count(launch.gpus_per_node), str(launch.gpus_per_node).rpartition(":")[0]
    cores = launch.nodes * asked.ranks_per_node * cores_per_rank(asked.config)
    return {"node": launch.nodes, "cpu": cores, "gres/gpu": gpus, f"gres/gpu:{kind}": gpus}
