"""Options of sbatch that a profile adds to a job: validation, GPUs, and lines of the batch script."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from shards.errors import UserError
from toolkit.config.schema import GPUS, gpu_count

# By full name without leading dashes; true: an option without a value; None: omit one that would be set otherwise.
Options = dict[str, str | bool | None]

# sbatch's short options.
_SHORT = {
    "A": "account", "a": "array", "B": "extra-node-info", "b": "begin", "C": "constraint", "c": "cpus-per-task",
    "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "h": "help",
    "i": "input", "J": "job-name", "k": "no-kill", "L": "licenses", "M": "clusters", "m": "distribution", "N": "nodes",
    "n": "ntasks", "O": "overcommit", "o": "output", "p": "partition", "Q": "quiet", "q": "qos", "S": "core-spec",
    "s": "oversubscribe", "t": "time", "u": "usage", "V": "version", "v": "verbose", "W": "wait", "w": "nodelist",
    "x": "exclude",
}  # fmt: skip
_KEY = "set the profile's key {}, by which ranks are counted and the checks are made"
_ONE_GPU = (
    "ranks choose among all GPUs of their node: set gpus_per_node, and ranks_per_node if it is not one rank a GPU"
)
# Options that the launcher sets, and what to do instead.
_REFUSED = {
    **dict.fromkeys(("nodes", "time", "partition", "account", "qos", "constraint", "signal", "array"), _KEY),
    **dict.fromkeys(("gpus-per-node", "gpus-per-socket"), _KEY.format("gpus_per_node")),
    **dict.fromkeys(("ntasks-per-node", "tasks-per-node"), _KEY.format("ranks_per_node")),
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), _KEY.format("cpus_per_rank")),
    "ntasks": _KEY.format("nodes, and ranks_per_node"),
    "ntasks-per-gpu": _ONE_GPU,
    "gpus-per-task": _ONE_GPU,
    "job-name": "name a job with --name",
    **dict.fromkeys(("output", "error", "input", "open-mode"), "logs are in the run folder; leave it out"),
    **dict.fromkeys(("chdir", "workdir"), "a job runs in the working directory of the command; leave it out"),
    **dict.fromkeys(("test-only", "wrap"), "the launcher writes the script; --dry-run tests it"),
    **dict.fromkeys(("wait", "quiet", "parsable"), "the launcher reads sbatch's answer; leave it out"),
    **dict.fromkeys(("help", "usage", "version"), "nothing would be submitted; leave it out"),
    **dict.fromkeys(("clusters", "cluster"), "export SLURM_CLUSTERS instead, which squeue and scancel read too"),
}
# Options of srun that change the ranks, what they see or where they write.
_REFUSED_BY_SRUN = (
    "nodes", "ntasks", "ntasks-per-node", "tasks-per-node", "ntasks-per-gpu", "cpus-per-task", "cpus-per-gpu",
    "gpus-per-task", "gpus-per-socket", "output", "error", "input", "time",
)  # fmt: skip
_KNOWN = (*_REFUSED, "gres", "gpus", "requeue", "no-requeue")
_TRES = re.compile(r"tres-(?:per-\w+|bind)")


def read_options(values: Mapping[Any, Any], where: str) -> Options:
    """Validate a profile's section `sbatch`.

    Null and false omit an option, true is one without a value, and a list is joined by commas. Only for `requeue` does
    false mean --no-requeue. A name may have leading dashes or underscores, or be one of sbatch's short ones.

    Args:
        values: Section.
        where: File and section, for messages.

    Returns:
        Options by full name; GPUs stay as `gres` or `gpus`, in the form of `gpus_per_node`.

    Raises:
        UserError: A name or value is invalid, or the launcher sets the option.
    """
    options: Options = {}
    seen: dict[str, str] = {}
    for key, value in values.items():
        name, text = _name(key, where), _value(value, f"{where}.{key}")
        if name in seen:
            raise UserError(f"{where}.{key}: the option is given twice, as {seen[name]} too; keep one")
        seen[name] = str(key)
        if name in ("requeue", "no-requeue"):
            _read_requeue(options, name, text, f"{where}.{key}")
        elif text is not None and text is not False:
            _refuse(name, text, f"{where}.{key}")
            options[name] = text
        elif name == "wckey":  # which submitit would set
            options[name] = None
    requested_gpus(options, where)
    return options


def check_srun(words: list[str], where: str) -> None:
    """Refuse arguments of srun that change the ranks, the GPUs that they see, or where they write.

    Raises:
        UserError: There is one.
    """
    for word in words:
        name = word.partition("=")[0]
        long = name[2:] if name.startswith("--") else _SHORT.get(name[1:2], "") if name[:1] == "-" else ""
        if long in _REFUSED_BY_SRUN:
            raise UserError(f"{where}: {word}: {_REFUSED[long].format(long)}")
        if long == "gpu-bind" or _TRES.fullmatch(long):
            _refuse(long, word.partition("=")[2], f"{where}: {word}")


def requested_gpus(options: Options, where: str) -> str | None:
    """Return the GPUs of a node that `gres` or `gpus` request, in the form of `gpus_per_node`; None for none.

    Raises:
        UserError: Both request some, or there are several types.
    """
    requested = {}
    for name in ("gres", "gpus"):
        text = options.get(name)
        if text is True:
            raise UserError(f"{where}.{name} is true; expected a number, or a type and a number such as a100:4")
        gpus = _gpus(str(text or ""), name, where)
        if len(gpus) > 1:
            raise UserError(f"{where}.{name} requests several types of GPU ({text}); ranks need one: keep one")
        requested.update({name: gpus[0]} if gpus else {})
    if len(requested) > 1:
        raise UserError(f"{where}.gres and {where}.gpus both request GPUs: keep one, or set gpus_per_node instead")
    return next(iter(requested.values()), None)


def with_gpus(options: Options, gpus: int | str | None, nodes: int) -> Options:
    """Return the options with this number of GPUs a node, requested by the option that the profile uses.

    Args:
        options: Options as read.
        gpus: GPUs of each node, such as 4 or a100:4; None or 0 for no GPU.
        nodes: Number of nodes.
    """
    entries = str(options.get("gres", "")).split(",")
    others = [entry for entry in entries if entry and _gpu(entry, "gres") is None]  # such as a disk
    rest = {name: value for name, value in options.items() if name not in ("gres", "gpus")}
    count, by_gres = gpu_count(gpus), others != entries and "gres" in options
    if count and by_gres:
        others.insert(0, f"gpu:{gpus}")
    elif count and "gpus" in options:
        kind, colon, _ = str(gpus).rpartition(":")
        rest["gpus"] = f"{kind}{colon}{count * nodes}"
    elif count:
        rest["gpus-per-node"] = str(gpus)
    return rest | ({"gres": ",".join(others)} if others else {})


def merge_options(launcher: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Merge the launcher's options with a profile's, which alone decides between --requeue and --no-requeue."""
    both = {**launcher, **options}
    if "no-requeue" in options:
        both["requeue"] = None
    return {name: value for name, value in both.items() if value is not None}


def directive(name: str, value: Any) -> str:
    """Return an option as a line of a batch script; true for one without a value."""
    return f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")


def _name(key: Any, where: str) -> str:
    """Return the full name of an option."""
    bare = str(key).lstrip("-").replace("_", "-")
    name = _SHORT.get(bare, bare)
    if not isinstance(key, str) or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) == 1:
        raise UserError(f"{where}: {key!r} is not an option of sbatch: expected a name such as mail-type")
    return name


def _value(value: Any, where: str) -> str | bool | None:
    """Return an option's value as text; true, false and null as they are."""
    if isinstance(value, list):
        items = [_value(each, where) for each in value if not isinstance(each, list)]
        if len(items) < len(value) or not all(isinstance(each, str) for each in items):
            raise UserError(f"{where} is {value}; expected a list of words or numbers")
        return ",".join(map(str, items)) or None
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str | int | float):
        raise UserError(f"{where} is {value}; expected a word, a number, true, false, null, or a list")
    text = str(value)
    if any(ord(letter) < 32 for letter in text):
        raise UserError(f"{where} is {text!r}; expected one line")
    return {"true": True, "false": False}.get(text.lower(), text)  # no option of sbatch takes these as text


def _read_requeue(options: Options, name: str, value: str | bool | None, where: str) -> None:
    if value is None:
        options.setdefault("requeue", None)
        return
    if not isinstance(value, bool):
        raise UserError(f"{where} is {value}; expected true, false or null")
    option = "requeue" if value == (name == "requeue") else "no-requeue"
    other = "no-requeue" if option == "requeue" else "requeue"
    if options.get(other):
        raise UserError(f"{where}: the profile sets both --requeue and --no-requeue: keep one")
    options[option] = True


def _refuse(name: str, text: str | bool, where: str) -> None:
    """Refuse options that the launcher sets, and requests of GPUs that do not give the number of ranks.

    Raises:
        UserError: It is one of these.
    """
    instead = _REFUSED.get(name)
    matches = [known for known in _KNOWN if known.startswith(name)]
    if matches and name not in _KNOWN:  # sbatch accepts abbreviated names
        instead = f"write the option's full name, such as {matches[0]}"
    if _TRES.fullmatch(name) and "gpu" in str(text):
        instead = _ONE_GPU
    if name == "gpu-bind" and str(text).split(",")[-1] not in ("none", "verbose"):
        instead = _ONE_GPU
    if instead is not None:
        raise UserError(f"{where}: {instead.format(name)}")


def _gpus(text: str, name: str, where: str) -> list[str]:
    requested = []
    for each in text.split(","):
        gpus = _gpu(each, name)
        if gpus is None:
            continue
        if not GPUS.fullmatch(gpus):
            example = "gpu:4 or gpu:a100:4" if name == "gres" else "4 or a100:4"
            raise UserError(f"{where}.{name} is {text}; expected GPUs as {example}")
        if gpu_count(gpus):
            requested.append(gpus)
    return requested


def _gpu(entry: str, name: str) -> str | None:
    """Return the GPUs of an entry of `gres` or `gpus` as TYPE:NUMBER; None for another resource."""
    parts = re.split("[:=]", entry.strip().removeprefix("gres/").removeprefix("gres:"))
    if name == "gres":
        if parts[0] != "gpu":
            return None
        parts = parts[1:] if parts[-1].isdecimal() else [*parts[1:], "1"]
    return ":".join(parts) if entry.strip() else None
