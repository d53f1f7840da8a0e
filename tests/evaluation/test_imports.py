"""What heavy libraries the evaluation does without until it computes, loads or draws something."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib, pkgutil, sys
import lcf_fast.evaluation as package
found = [module.name for module in pkgutil.iter_modules(package.__path__)]
for name in found:
    importlib.import_module(f"{package.__name__}.{name}")
print(len(found), sorted({"scipy", "datasets", "matplotlib", "transformers", "pandas"} & sys.modules.keys()))
"""


def test_nothing_heavy_is_imported() -> None:
    told = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    count, heavy = told.split(maxsplit=1)
    assert int(count) >= 10
    assert heavy.strip() == "[]"
