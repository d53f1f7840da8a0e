"""Tables in README, docs/ and bench/NOTES.md that are made from committed results: this writes them all.

Each stands between its own markers, ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. With folders that ``make gpu``
filled, their results first go to bench/results/, with a plot each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcf_fast.demo.slot_report import study_markdown
from lcf_fast.evaluation.latency_report import latency_markdown

from . import eval_table, plot, report, table, targets
from .machine import slug
from .table import replaced

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python -m bench.published"
EXAMPLES = """examples:
  python -m bench.published                  the tables again, from bench/results/
  python -m bench.published out/gpu          first take what make gpu left there
"""
RESULTS = ROOT / "bench" / "results"
NOTES = ROOT / "bench" / "NOTES.md"


@dataclass(frozen=True)
class Region:
    """One table, or more of a kind: where it stands, what it is made from, and how.

    Attributes:
        result: a file in bench/results/, or a pattern: then each file has its table.
    """

    page: str
    name: str
    result: str
    table: Callable[[Path], str]

    def files(self, results: Path) -> list[Path]:
        return sorted(results.glob(self.result))

    def written(self, text: str) -> str:
        """The page's text with the table in its place.

        Raises:
            ValueError: the page has no such markers, or no such result.
        """
        files = self.files(RESULTS)
        if not files:
            raise ValueError(f"expected bench/results/{self.result}")
        made = "\n\n".join(map(self.table, files))
        return replaced(text, made, f"<!-- {self.name}:begin -->", f"<!-- {self.name}:end -->")


def _study(path: Path) -> str:
    return study_markdown(json.loads(path.read_text(encoding="utf-8"))).strip()


def _latency(path: Path) -> str:
    return latency_markdown(json.loads(path.read_text(encoding="utf-8"))["cells"]).strip()


REGIONS = (
    Region("README.md", "eval", "evaluation/small-agents.json", eval_table.table),
    Region("docs/slots.md", "study", "evaluation/slots.json", _study),
    Region("docs/slots.md", "study-variants", "evaluation/slots-variants.json", _study),
    Region("docs/evaluation.md", "latency", "evaluation/latency-*.json", _latency),
)


def take(folder: Path, results: Path) -> list[Path]:
    """Put what ``make gpu`` left in a folder where results are committed; returns the files written.

    Names are the GPU's. Of the summary only what passed is kept: what its steps printed may name the machine. Steps and
    cells of the latency protocol add to those of an earlier folder of the same commit and versions.

    Raises:
        ValueError: it holds nothing. OSError: a file that cannot be read.
    """
    taken: dict[Path, dict[str, Any]] = {}
    for source, suffix in (("bench/results.json", ""), ("sweep/results.json", "-sweep")):
        if (data := _read(folder / source)) is not None:
            taken[results / f"{slug(data['about'])}{suffix}.json"] = data
    if (data := _read(folder / "latency/latency.json")) is not None:
        file = results / "evaluation" / f"latency-{slug(data['cells'][0]['about'])}.json"
        done = {(cell["group"], cell["batch"]) for cell in data["cells"]}
        earlier = (_read(file) or {"cells": []})["cells"]
        kept = [cell for cell in earlier if (cell["group"], cell["batch"]) not in done]
        kept = [cell for cell in kept if _are_alike(cell["about"], data["cells"][0]["about"])]
        taken[file] = {**data, "cells": kept + data["cells"]}
    if (data := _read(folder / "summary.json")) is not None:
        steps = [{name: step[name] for name in ("step", "status", "seconds")} for step in data["steps"]]
        name = slug({"device_type": "cuda", "device": data["about"]["gpu"]})
        file = results / "checks" / f"{name}.json"
        earlier = _read(file)
        if earlier is not None and _are_alike(earlier["about"], data["about"]):
            done = {step["step"] for step in steps}
            steps = [step for step in earlier["steps"] if step["step"] not in done] + steps
        taken[file] = {"about": data["about"], "steps": steps}
    if not taken:
        raise ValueError(f"{folder}: expected what make gpu leaves: bench/results.json, summary.json or others")
    written = []
    for file, data in taken.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(report.to_json(data))
        written.append(file)
        if data.get("rows"):
            plot.draw(data, file.with_suffix(".svg"))
            written.append(file.with_suffix(".svg"))
    return written


def _are_alike(about: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether results of two runs are of one commit under the same versions. A second machine may have another driver
    or CPU."""
    names = ("commit", "torch", "triton")
    return all(about.get(name) == other.get(name) for name in names)


def _read(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR", help="that make gpu filled, in that order")
    given = parser.parse_args(arguments)
    for folder in given.folders:
        try:
            for file in take(folder, RESULTS):
                print(f"{file.relative_to(RESULTS.parents[1])}: from {folder.name}")
        except (ValueError, OSError, KeyError, ImportError) as error:
            print(f"{COMMAND}: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
    for region in REGIONS:
        page = ROOT / region.page
        page.write_text(region.written(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{region.page}: {region.name}, from bench/results/{region.result}")
    readme = ROOT / "README.md"
    made = table.table(list(RESULTS.glob("*.json")))
    readme.write_text(replaced(readme.read_text(encoding="utf-8"), made), encoding="utf-8")
    print("README.md: bench, from bench/results/*.json")
    found = targets.read(targets.committed(RESULTS))
    targets.write(NOTES, found)
    print("bench/NOTES.md: targets\n\n" + "\n".join(line for evidence in found for line in targets.lines(evidence)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
