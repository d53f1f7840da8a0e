"""The main job: errors and times of every op on caches that real transformers models made. ``python -m bench --help``.

Runs from a checkout and is not installed. ``python -m`` and pytest put the repository's root first on the path, where
./kernels would answer transformers' ``import kernels``; at the end an installed library of that name still wins.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if any(Path(entry or ".").resolve() == ROOT for entry in sys.path):
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    sys.path.append(str(ROOT))
