"""Each script shows its help, and refuses a wrong option in one line, without heavy imports."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLKIT = Path(__file__).resolve().parents[2] / "toolkit"
HEAVY = {"torch", "torchaudio", "transformers", "numpy", "PIL", "soundfile", "tqdm"}
SCRIPTS = ("analyze.py", "check_shards.py", "embed.py", "evaluate.py", "index.py", "report.py", "search.py")


@pytest.mark.parametrize(
    ("script", "heavy"), [*((name, HEAVY) for name in SCRIPTS), ("make_shards.py", HEAVY - {"numpy", "PIL"})]
)
def test_help_and_mistakes_need_no_heavy_imports(script, heavy):
    def run(option):
        command = [sys.executable, "-X", "importtime", TOOLKIT / script, option]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        lines = done.stderr.splitlines()
        assert not heavy & {line.split()[-1] for line in lines if line.startswith("import time:")}
        return done.returncode, done.stdout, [line for line in lines if not line.startswith("import time:")]

    code, shown, errors = run("--help")
    assert (code, errors) == (0, [])
    assert script in shown
    code, shown, errors = run("--nonsense")
    assert (code, shown, len(errors)) == (2, "", 1)
