"""What an exported folder says of itself: the model card README.md, and modules.json for sentence-transformers."""

import json
from pathlib import Path

MODULES = [{"idx": 0, "name": "0", "path": "", "type": "toolkit.hub.sentence_transformer.SpeechImageModule"}]


def write_modules(folder: Path) -> None:
    """Write `modules.json`, which names the class that sentence-transformers loads."""
    (folder / "modules.json").write_text(json.dumps(MODULES, indent=2))
