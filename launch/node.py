"""Script of a rank: submitit's entry point, with the packages beside this file first on the path.

    python -u .../code/HASH/launch/node.py -u -m submitit.core._submit FOLDER

`python -m` alone would import from the working directory first, where the code may have changed since the job was
submitted. Submitit appends `-u -m ... FOLDER`, of which only the folder is used.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # not when a loader's worker imports this file again
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.argv[1:] = sys.argv[-1:]

    from submitit.core.submission import submitit_main

    submitit_main()
