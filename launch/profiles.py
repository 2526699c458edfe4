"""Profiles: what a cluster wants of every job, in a YAML file that the name of the cluster or of this host finds."""

import fnmatch
import re
import shutil
import socket
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from launch.slurm.sbatch_options import asked_gpus, check_srun, read_options
from shards.errors import UserError
from toolkit.config.load import describe, nearest, read_yaml, typed
from toolkit.config.schema import GPUS, Config, Launch

PROFILES = Path(__file__).resolve().parents[1] / "slurm" / "profiles"
# Keys of the section `launch` that a profile may fill in.
FILLED = (
    "partition", "account", "qos", "constraint", "time", "signal", "nodes", "ranks_per_node", "gpus_per_node",
    "cpus_per_rank", "array",
)  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """One cluster's defaults; `slurm/profiles/example.yaml` says what each key is for."""

    name: str = "none"
    match: list[str] = field(default_factory=list)  # patterns of SLURM's ClusterName or of this host's name
    launch: dict[str, Any] = field(default_factory=dict)  # defaults of the section `launch`
    setup: list[str] = field(default_factory=list)  # shell lines before the ranks start
    env: dict[str, Any] = field(default_factory=dict)  # environment of the ranks, all of it text
    scratch: str | None = None  # folder on a node's own disk: data.cache, where that is not set
    container: str | None = None  # command before the ranks' python, such as apptainer exec IMAGE
    python: str | None = None  # the ranks' python; null: this one, or `python` in a container
    srun: list[str] = field(default_factory=list)  # further arguments of srun
    sbatch: dict[str, Any] = field(default_factory=dict)  # further options of sbatch, as `read_options` gives them

    @property
    def contained(self) -> bool:
        """Do the ranks run in a container, with a python of its own?"""
        return bool(self.container) or any(word.startswith("--container-image") for word in self.srun)


def find_profile(launch: Launch) -> Profile:
    """The profile that is asked for, else the one that matches SLURM's ClusterName or this host, else an empty one.

    Raises:
        UserError: There is none of this name, a file cannot be read or holds an unknown key, or several match.
    """
    if launch.profile is not None:
        return read_profile(_path(launch.profile))
    names = _here()
    matching = [
        profile
        for profile in map(read_profile, sorted(PROFILES.glob("*.yaml")))
        if any(fnmatch.fnmatchcase(name, pattern.lower()) for pattern in profile.match for name in names)
    ]
    if len(matching) > 1:
        found = ", ".join(profile.name for profile in matching)
        raise UserError(f"the profiles {found} all match {' or '.join(names)}: choose one with --profile NAME")
    return matching[0] if matching else Profile()


def read_profile(path: Path) -> Profile:
    """Read one profile.

    Raises:
        UserError: It is not YAML, or a key is unknown or has a value of another type.
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
        elif key in _SECTIONS and isinstance(value, dict):
            values[key] = _SECTIONS[key](value, where)
        elif value is not None:  # without a value, a list or section is empty
            values[key] = _checked(value, kinds[key], where)
    check_srun(values.get("srun", []), f"{path}: srun")
    return Profile(name=path.stem, launch=_with_gpus(launch, values.get("sbatch", {}), path), **values)


def apply_profile(config: Config, profile: Profile, given: Collection[str]) -> Config:
    """Fill in what neither the command line nor the configuration says.

    Args:
        config: As read.
        profile: Its values take the place of defaults only.
        given: Keys of the command line, such as `launch.nodes`; their values stay, defaults too.
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


def slurm_config() -> dict[str, str] | None:
    """What SLURM says of itself; None where this machine is configured for none, though the commands may be there.

    Raises:
        UserError: It is configured and does not answer.
    """
    if shutil.which("scontrol") is None:
        return None
    try:
        answer = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError("SLURM does not answer within a minute: try again later, or --cluster local") from None
    if answer.returncode:
        complaint = " ".join(answer.stderr.split())
        if re.search(r"configuration source|slurm\.conf|process configuration", complaint):
            return None
        raise UserError(f"SLURM does not answer ({complaint}): try again later, or --cluster local")
    pairs = (line.partition("=") for line in answer.stdout.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _here() -> list[str]:
    """The names that patterns are compared with, in lower case."""
    names = [(slurm_config() or {}).get("ClusterName"), socket.getfqdn(), socket.gethostname()]
    return list(dict.fromkeys(name.lower() for name in names if name))


def _path(name: str) -> Path:
    for path in (Path(name), PROFILES / f"{name}.yaml"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    raise UserError(f"profile {name}: no such file or name; there are {', '.join(names) or 'none'} in {PROFILES}")


def _read_env(values: Mapping[Any, Any], where: str) -> dict[str, str]:
    """The variables of a section `env` as text; null leaves a variable as it is.

    Raises:
        UserError: A name is no variable's, or a value no text.
    """
    env = {}
    for name, value in values.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII):
            raise UserError(f"{where}: {name!r} is no name of a variable: expected letters, digits and underscores")
        if value is None:
            continue
        if not isinstance(value, str | int | float) or "\0" in str(value):
            raise UserError(f"{where}.{name} is {value!r}; expected text, a number, true, false or null")
        env[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return env


def _with_gpus(launch: dict[str, Any], sbatch: dict[str, Any], path: Path) -> dict[str, Any]:
    """A profile's keys of `launch`, with the GPUs that its options of sbatch ask for.

    Raises:
        UserError: Key and option both ask for some, or the key is no number of GPUs.
    """
    own, asked = launch.get("gpus_per_node"), asked_gpus(sbatch, f"{path}: sbatch")
    if own is not None and not GPUS.fullmatch(str(own)):
        expected = "int or null, or a type and a number such as a100:4"
        raise UserError(f"{path}: gpus_per_node is {own!r}; expected {expected}")
    if asked is None:
        return launch
    if own is not None:
        raise UserError(f"{path}: gpus_per_node and an option of sbatch both ask for GPUs: keep one")
    return {**launch, "gpus_per_node": int(asked) if asked.isdecimal() else asked}


_SECTIONS = {"sbatch": read_options, "env": _read_env}  # with rules of their own


def _checked(value: Any, kind: Any, where: str) -> Any:
    try:
        return typed(value, kind)
    except TypeError:
        raise UserError(f"{where} is {value!r}; expected {describe(kind)}") from None
