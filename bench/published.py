"""Tables in README and docs/ that are made from committed results: ``python -m bench.published`` writes them all.

Each stands between its own markers, ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. The benchmark's own table is
`bench.table`'s.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcf_fast.demo.slot_report import study_markdown
from lcf_fast.evaluation.latency_report import latency_markdown

from . import eval_table
from .table import replaced

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python -m bench.published"


@dataclass(frozen=True)
class Region:
    """One table: where it stands, what it is made from, and how."""

    page: str
    name: str
    result: str
    table: Callable[[Path], str]

    def written(self, text: str) -> str:
        """The page's text with the table in its place.

        Raises:
            ValueError: the page has no such markers. OSError: no such result.
        """
        made = self.table(ROOT / "bench" / "results" / self.result)
        return replaced(text, made, f"<!-- {self.name}:begin -->", f"<!-- {self.name}:end -->")


def _study(path: Path) -> str:
    return study_markdown(json.loads(path.read_text(encoding="utf-8"))).strip()


def _latency(path: Path) -> str:
    return latency_markdown(json.loads(path.read_text(encoding="utf-8"))["cells"]).strip()


REGIONS = (
    Region("README.md", "eval", "evaluation/small-agents.json", eval_table.table),
    Region("docs/slots.md", "study", "evaluation/slots.json", _study),
    Region("docs/slots.md", "study-variants", "evaluation/slots-variants.json", _study),
    Region("docs/evaluation.md", "latency", "evaluation/latency-cpu.json", _latency),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.parse_args(arguments)
    for region in REGIONS:
        page = ROOT / region.page
        page.write_text(region.written(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{region.page}: {region.name}, from bench/results/{region.result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
