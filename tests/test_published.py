"""Tables of README and docs/ are those of the committed results; what makes them leaves the rest of a page alone."""

from __future__ import annotations

import json

import pytest

from bench import published
from bench.cases import QWEN3
from lcf_fast import LCFConfig

pytest.importorskip("transformers")


@pytest.mark.parametrize("region", published.REGIONS, ids=lambda region: region.name)
def test_a_table_is_that_of_its_results(region: published.Region) -> None:
    text = (published.ROOT / region.page).read_text(encoding="utf-8")
    assert region.written(text) == text, f"run: {published.COMMAND}"
    begin, end = (f"<!-- {region.name}:{word} -->" for word in ("begin", "end"))
    table = text.partition(begin)[2].partition(end)[0]
    assert table.count("\n|") > 3
    cleared = text.replace(table, "\nold\n")
    assert region.written(cleared) == text


def test_every_result_is_published() -> None:
    folder = published.ROOT / "bench" / "results" / "evaluation"
    shown = [path for region in published.REGIONS for path in region.files(published.RESULTS)]
    assert sorted(folder.iterdir()) == sorted(shown)


def test_the_first_table_has_the_figures_of_the_study() -> None:
    """README's row of right answers, by number of facts: LCF-X, then 8 and 16 slots."""
    study = json.loads((published.ROOT / "bench/results/evaluation/slots.json").read_text(encoding="utf-8"))

    def means(slots: int) -> str:
        cells = [cell for cell in study["cells"] if cell["slots"] == slots]
        assert len(cells) == 5
        shares = [100 * sum(cell["matched"][n] / cell["items"] for cell in cells) / 5 for n in ("1", "4", "8")]
        return " / ".join(f"{share:.1f}".replace("100.0", "100") for share in shares)

    readme = (published.ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in readme.splitlines() if line.startswith("| right answers of small agents"))
    assert f"| {means(0)}% | {means(8)}% (k = 8); {means(16)}% (k = 16) |" in row
    parameters = {LCFConfig(QWEN3, QWEN3).parameter_count(), LCFConfig(QWEN3, QWEN3, slots=8).parameter_count()}
    assert all(f"{count:,}" in readme for count in parameters)
