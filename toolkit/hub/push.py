"""Upload of an exported model to the hub: the model, its processor files and the card, nothing else of the folder."""

import json
from pathlib import Path

from shards.errors import UserError
from toolkit.hub.card import CARD, MODULES

_SETTINGS = ("config.json", "preprocessor_config.json")
_WEIGHTS, _WEIGHT_INDEX = "model.safetensors", "model.safetensors.index.json"


def exported_files(folder: Path) -> list[Path]:
    """Return the files of an exported model that are uploaded as they are.

    Raises:
        UserError: The folder holds no complete model of this toolkit.
    """
    missing = [name for name in _SETTINGS if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} holds no {missing[0]}: pass a folder that training exported")
    try:
        kind = json.loads((folder / _SETTINGS[0]).read_bytes()).get("model_type")
        weights = [folder / _WEIGHTS]
        if (folder / _WEIGHT_INDEX).is_file():  # weights in several files
            parts = set(json.loads((folder / _WEIGHT_INDEX).read_bytes())["weight_map"].values())
            weights = [folder / _WEIGHT_INDEX, *(folder / Path(part).name for part in sorted(parts))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} holds a damaged model: {error}") from None
    if kind != "speech_image":
        raise UserError(f"{folder} holds a model of the type {kind!r}: pass a folder that training exported")
    for path in weights:
        if not path.is_file() or not path.stat().st_size:
            raise UserError(f"{folder} holds no weights ({path.name}): pass a folder that training exported")
    return [*(folder / name for name in _SETTINGS), *weights]


def contents(folder: Path, card: str) -> dict[str, Path | bytes]:
    """Return what is uploaded, by its name in the repository: files, or the content of those that are generated.

    Raises:
        UserError: The folder holds no complete model of this toolkit.
    """
    generated = {CARD: card.encode(), "modules.json": json.dumps(MODULES, indent=2).encode()}
    return {path.name: path for path in exported_files(folder)} | generated


def push(files: dict[str, Path | bytes], repo: str, private: bool = False) -> str:
    """Upload files to a model repository of the hub in one commit; the repository is created if there is none.

    Args:
        files: Result of `contents`.
        repo: Name of the repository: "owner/name".
        private: Create it as private.

    Returns:
        URL of the repository.

    Raises:
        UserError: The hub refuses it, or `private` is requested and the repository exists and is public.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api = HfApi(library_name="speech-image-toolkit")
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        public = private and not api.repo_info(url.repo_id).private
        if not public:
            operations = [
                CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
                for name, content in files.items()
            ]
            api.create_commit(url.repo_id, operations, commit_message="Upload a model of the speech-image toolkit")
    except Exception as error:  # of the connection, of the name, of the hub
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = ": log in with hf auth login, or set HF_TOKEN" if status in (401, 403) else ""
        raise UserError(f"--push {repo}: {' '.join(str(error).split())[:300]}{advice}") from None
    if public:
        raise UserError(f"--private: {repo} exists and is public: nothing was uploaded; change it on the hub first")
    return str(url)
