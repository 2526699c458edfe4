"""Profiles: a cluster's settings for every job, in a YAML file that is chosen by the name of the cluster or host."""

import fnmatch
import re
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from launch.slurm.client import slurm_config
from launch.slurm.sbatch_options import check_srun, read_options, requested_gpus
from shards.errors import UserError
from toolkit.config.load import nearest
from toolkit.config.schema import GPUS, Config, Launch
from toolkit.config.values import describe, typed
from toolkit.config.yaml_files import read_yaml

PROFILES = Path(__file__).resolve().parents[1] / "slurm" / "profiles"
# Keys of the section `launch` that a profile may fill in.
FILLED = (
    "partition", "account", "qos", "constraint", "time", "signal", "nodes", "ranks_per_node", "gpus_per_node",
    "cpus_per_rank", "array",
)  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """One cluster's defaults; `slurm/profiles/example.yaml` explains the keys."""

    name: str = "none"
    match: list[str] = field(default_factory=list)  # patterns of SLURM's ClusterName or of this host's name
    launch: dict[str, Any] = field(default_factory=dict)  # defaults of the section `launch`
    setup: list[str] = field(default_factory=list)  # shell lines before the ranks start
    env: dict[str, Any] = field(default_factory=dict)  # environment of the ranks, as text
    scratch: str | None = None  # folder on a node's local disk: data.cache, if that is not set
    container: str | None = None  # command before the ranks' python, such as apptainer exec IMAGE
    python: str | None = None  # the ranks' python; null: this one, or `python` in a container
    srun: list[str] = field(default_factory=list)  # further arguments of srun
    sbatch: dict[str, Any] = field(default_factory=dict)  # further options of sbatch, as of `read_options`

    @property
    def contained(self) -> bool:
        """Whether the ranks run in a container, with its python."""
        return bool(self.container) or any(word.startswith("--container-image") for word in self.srun)


def find_profile(launch: Launch) -> Profile:
    """Return the requested profile, else the one that matches SLURM's ClusterName or this host, else an empty one.

    Raises:
        UserError: There is no such profile, a file cannot be read or has an unknown key, or several match.
    """
    if launch.profile is not None:
        return read_profile(_path(launch.profile))
    candidates = [(slurm_config() or {}).get("ClusterName"), socket.getfqdn(), socket.gethostname()]
    names = list(dict.fromkeys(name.lower() for name in candidates if name))
    matching = [
        profile
        for profile in map(read_profile, sorted(PROFILES.glob("*.yaml")))
        if any(fnmatch.fnmatchcase(name, pattern.lower()) for pattern in profile.match for name in names)
    ]
    if len(matching) > 1:
        several = ", ".join(profile.name for profile in matching)
        raise UserError(f"the profiles {several} all match {' or '.join(names)}: choose one with --profile NAME")
    return matching[0] if matching else Profile()


def read_profile(path: Path) -> Profile:
    """Read one profile.

    Raises:
        UserError: It is not YAML, or a key is unknown or has a value of the wrong type.
    """
    kinds = {name: kind for name, kind in get_type_hints(Profile).items() if name not in ("name", "launch")}
    values: dict[str, Any] = {}
    launch: dict[str, Any] = {}
    for key, value in read_yaml(path, fractions=False).items():
        where = f"{path}: {key}"
        if key in FILLED:
            launch[key] = _checked(value, get_type_hints(Launch)[key], where)
        elif key not in kinds:
            valid = sorted({*kinds, *FILLED})
            near = nearest(str(key), valid)
            raise UserError(f"{where}: unknown key; did you mean {near}? (there are {', '.join(valid)})")
        elif key in ("sbatch", "env") and isinstance(value, dict):
            values[key] = (read_options if key == "sbatch" else _read_env)(value, where)
        elif value is not None:  # without a value, a list or section is empty
            values[key] = _checked(value, kinds[key], where)
    check_srun(values.get("srun", []), f"{path}: srun")
    return Profile(name=path.stem, launch=_with_gpus(launch, values.get("sbatch", {}), path), **values)


def apply_profile(config: Config, profile: Profile, given: Collection[str]) -> Config:
    """Fill in values that neither the command line nor the configuration sets.

    Args:
        config: Configuration as read.
        profile: Profile, whose values replace defaults only.
        given: Keys of the command line, such as `launch.nodes`; their values are kept, defaults too.
    """
    launch, untouched = config.launch, Launch()
    filled = {
        key: value
        for key, value in profile.launch.items()
        if f"launch.{key}" not in given and getattr(launch, key) == getattr(untouched, key)
    }
    data = config.data
    if profile.scratch and data.cache is None and "data.cache" not in given:
        data = replace(data, cache=profile.scratch)
    return replace(config, launch=replace(launch, **filled), data=data)


def _path(name: str) -> Path:
    for path in (Path(name), PROFILES / f"{name}.yaml"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    raise UserError(f"profile {name}: no such file or name; there are {', '.join(names) or 'none'} in {PROFILES}")


def _read_env(values: Mapping[Any, Any], where: str) -> dict[str, str]:
    """Return the variables of a section `env` as text; null leaves a variable as it is.

    Raises:
        UserError: A name or a value is invalid.
    """
    env = {}
    for name, value in values.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII):
            raise UserError(f"{where}: {name!r} is not a variable name: expected letters, digits and underscores")
        if value is None:
            continue
        if not isinstance(value, str | int | float) or "\0" in str(value):
            raise UserError(f"{where}.{name} is {value!r}; expected text, a number, true, false or null")
        env[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return env


def _with_gpus(launch: dict[str, Any], sbatch: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a profile's keys of `launch`, with the GPUs that its options of sbatch request.

    Raises:
        UserError: Key and option both request some, or the key is not a number of GPUs.
    """
    of_key, of_sbatch = launch.get("gpus_per_node"), requested_gpus(sbatch, f"{path}: sbatch")
    if of_key is not None and not GPUS.fullmatch(str(of_key)):
        expected = "int or null, or a type and a number such as a100:4"
        raise UserError(f"{path}: gpus_per_node is {of_key!r}; expected {expected}")
    if of_sbatch is None:
        return launch
    if of_key is not None:
        raise UserError(f"{path}: gpus_per_node and an option of sbatch both request GPUs: keep one")
    return {**launch, "gpus_per_node": int(of_sbatch) if of_sbatch.isdecimal() else of_sbatch}


def _checked(value: Any, kind: Any, where: str) -> Any:
    try:
        return typed(value, kind)
    except TypeError:
        raise UserError(f"{where} is {value!r}; expected {describe(kind)}") from None
