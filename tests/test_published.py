"""Tables of README and docs/ are those of the committed results; what makes them leaves the rest of a page alone."""

from __future__ import annotations

import pytest

from bench import published

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
    assert {f"evaluation/{path.name}" for path in folder.iterdir()} == {region.result for region in published.REGIONS}
