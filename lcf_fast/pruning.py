"""Which layers of a trained adapter to keep: gate audit, single-layer ablation, ranking (spec, section 6).

A layer whose two gates are closed is *dead*: it makes no edit. One without which the metric is better is *harmful*.
The rest are *useful*, ranked by their importance: how much worse the metric is without each alone. Nothing is trained.
`lcf_fast.training.ablation.rank_layers_by_loss` ranks by the receiver's loss, at a fraction of the cost.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import BackendError, IndexRangeError, LCFError

if TYPE_CHECKING:
    from .adapter import LatentCacheFlow

__all__ = ["LayerFinding", "PruningError", "PruningReport", "audit_gates", "closed_gates", "rank_layers", "write_plot"]

#: "live": with an open gate, and no more is known.
Verdict = Literal["dead", "live", "harmful", "useful"]


class PruningError(LCFError, ValueError):
    """There are not the layers that were asked for, or a metric that cannot rank them."""


@dataclass(frozen=True)
class LayerFinding:
    """What was found of one of an adapter's layers.

    Attributes:
        key_gate, value_gate: logits; a gate is open above 0.
        metric_without: the metric with this layer alone switched off; None where it was not measured: a dead layer's
            is the whole adapter's.
        importance: how much worse that is than the whole adapter's, so negative for a harmful layer.
    """

    receiver_layer: int
    key_gate: float
    value_gate: float
    verdict: Verdict
    metric_without: float | None = None
    importance: float | None = None


@dataclass(frozen=True)
class PruningReport:
    """What was found of all of an adapter's layers, ascending.

    Attributes:
        metric: its name; None: only the gates were looked at.
        whole: the metric of the adapter as it is.
        alone: the metric with all layers switched off.
        examples, response_tokens: that the metric is a mean of, where that is known.
    """

    layers: tuple[LayerFinding, ...]
    metric: str | None = None
    higher_is_better: bool = False
    whole: float | None = None
    alone: float | None = None
    examples: int | None = None
    response_tokens: int | None = None

    def of(self, *verdicts: Verdict) -> tuple[int, ...]:
        """Receiver layers of these verdicts, ascending."""
        return tuple(layer.receiver_layer for layer in self.layers if layer.verdict in verdicts)

    def ranked(self) -> tuple[int, ...]:
        """Useful receiver layers, the most important first; of equal ones the lower first."""
        useful = [layer for layer in self.layers if layer.verdict == "useful"]
        useful.sort(key=lambda layer: -(layer.importance or 0.0))
        return tuple(layer.receiver_layer for layer in useful)

    def keep(self, most: int | None = None) -> tuple[int, ...]:
        """Receiver layers to keep, ascending, for `LatentCacheFlow.prune`.

        Args:
            most: how many of the useful ones; None: all that are neither dead nor harmful.

        Raises:
            PruningError: more than there are, fewer than one, a number of layers that were not ranked.
        """
        left = self.of("live", "useful")
        if not left:
            got = f"none: {len(self.of('dead'))} dead, {len(self.of('harmful'))} harmful"
            raise PruningError("adapter", expected="a layer that is worth keeping", got=got)
        if most is None:
            return left
        if self.metric is None:
            raise PruningError("keep", expected="layers ranked by a metric (rank_layers)", got="gates alone")
        if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= len(left):
            dropped = f"{len(self.of('dead'))} are dead, {len(self.of('harmful'))} harmful"
            expected = f"1 to {len(left)}, since of {len(self.layers)} layers {dropped}"
            raise PruningError("keep", expected=expected, got=repr(most))
        return tuple(sorted(self.ranked()[:most]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def audit_gates(adapter: LatentCacheFlow) -> PruningReport:
    """Which layers are dead, and which are live; nothing is computed."""
    findings = []
    gates = adapter.gate_logit.detach().float().tolist()
    for layer, (key, value) in zip(adapter.receiver_layers.tolist(), gates):
        findings.append(LayerFinding(layer, key, value, "live" if key > 0 or value > 0 else "dead"))
    return PruningReport(tuple(findings))


@contextmanager
def closed_gates(adapter: LatentCacheFlow, layers: Iterable[int]) -> Iterator[LatentCacheFlow]:
    """Within the block these receiver layers make no edit in eval mode, as if they had been pruned.

    No weight is copied but the gates'. ``gate_logit`` is another parameter within the block, and the very same as
    before behind it, also after an error: optimizers, and the digests that messages are known by, see no change.

    Raises:
        IndexRangeError: a layer that the adapter does not hold.
    """
    import torch

    held: list[int] = adapter.receiver_layers.tolist()
    layers = list(layers)
    for layer in layers:
        if layer not in held:
            raise IndexRangeError("layers", expected=f"receiver layers among {tuple(held)}", got=repr(layer))
    gates, seen = adapter.gate_logit, adapter._seen
    closed = gates.detach().clone()
    closed[[held.index(layer) for layer in layers]] = -1.0
    adapter.gate_logit = torch.nn.Parameter(closed, requires_grad=gates.requires_grad)
    try:
        yield adapter
    finally:
        adapter.gate_logit, adapter._seen = gates, seen


def rank_layers(
    adapter: LatentCacheFlow,
    metric: Callable[[LatentCacheFlow], float],
    *,
    higher_is_better: bool = False,
    name: str = "metric",
    progress: bool = False,
) -> PruningReport:
    """Switch off each live layer in turn, and see what becomes of a metric.

    Args:
        adapter: in eval mode while this runs; in the end as it was.
        metric: of the adapter as it is then; called for the whole, for none, and once for each live layer. It must
            give the same number for the same adapter (the same examples, greedy decoding).
        higher_is_better: True for an accuracy, False for a loss.
        progress: whether a bar is shown on standard error.

    Raises:
        PruningError: no layer has an open gate; a metric that is not finite. What ``metric`` raises.
    """
    import torch

    from .counting import counted

    report = audit_gates(adapter)
    live = live_layers(report)
    every = tuple(layer.receiver_layer for layer in report.layers)
    ablations = [(), every, *((layer,) for layer in live)]
    found: list[float] = []
    training = adapter.training
    adapter.eval()
    try:
        with torch.no_grad():
            for closed in counted(ablations, "ablations", total=len(ablations), shown=progress):
                with closed_gates(adapter, closed):
                    found.append(float(metric(adapter)))
    finally:
        adapter.train(training)
    whole, alone, *without = found
    return judged(report, name, whole, alone, dict(zip(live, without)), higher_is_better)


def live_layers(report: PruningReport) -> tuple[int, ...]:
    """Layers to ablate; PruningError if there are none."""
    live = report.of("live")
    if not live:
        got = f"none: both gates of all {len(report.layers)} layers are closed"
        raise PruningError("adapter", expected="a layer with an open gate", got=got)
    return live


def judged(
    report: PruningReport,
    metric: str,
    whole: float,
    alone: float,
    without: Mapping[int, float],
    higher_is_better: bool,
) -> PruningReport:
    """An audit's report with the metric of the whole adapter, of none of it, and without each live layer."""
    measured = {"with all layers": whole, "with none": alone}
    measured |= {f"without layer {layer}": value for layer, value in without.items()}
    for what, value in measured.items():
        if not math.isfinite(value):
            raise PruningError("metric", expected="a finite number", got=f"{value} {what}")
    layers = []
    for finding in report.layers:
        if finding.verdict == "live":
            value = without[finding.receiver_layer]
            importance = whole - value if higher_is_better else value - whole
            verdict: Verdict = "harmful" if importance < 0 else "useful"
            finding = replace(finding, verdict=verdict, metric_without=value, importance=importance)
        layers.append(finding)
    return replace(
        report, layers=tuple(layers), metric=metric, higher_is_better=higher_is_better, whole=whole, alone=alone
    )


# --- a picture
# ---------------------------------------------------------------------

_COLOURS = {"dead": "0.6", "live": "tab:blue", "harmful": "tab:red", "useful": "tab:green"}


def check_matplotlib() -> None:
    """Raises BackendError where `write_plot` would."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        expected = "matplotlib, which pip install 'lcf-fast[plot]' brings"
        raise BackendError("plot", expected=expected, got="an environment without it") from None


def write_plot(report: PruningReport, path: str | os.PathLike[str], kept: Iterable[int] = ()) -> None:
    """Gates and importance of each layer as a PNG file, layers of ``kept`` marked with a star.

    Raises:
        BackendError: matplotlib is not installed. OSError: the file cannot be written.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from .files import write_whole

    # Not through pyplot, which would look for a screen and keep every figure.
    rows = 1 if report.metric is None else 2
    places = range(len(report.layers))
    figure = Figure(figsize=(min(max(5.0, 0.35 * len(places)), 30.0), 2.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0]
    for side, name, shade in ((-0.2, "key", "tab:blue"), (0.2, "value", "tab:orange")):
        logits = [layer.key_gate if name == "key" else layer.value_gate for layer in report.layers]
        axes[0].bar([place + side for place in places], logits, width=0.4, color=shade, label=name)
    axes[0].set_ylabel("gate logit (open above 0)")
    axes[0].legend(fontsize=7)
    if report.metric is not None:
        heights = [layer.importance or 0.0 for layer in report.layers]
        axes[1].bar(places, heights, color=[_COLOURS[layer.verdict] for layer in report.layers])
        change = "fall" if report.higher_is_better else "rise"
        axes[1].set_ylabel(f"importance ({change} of the {report.metric} without it)")
        shown = dict.fromkeys(layer.verdict for layer in report.layers)
        axes[1].legend(handles=[Patch(color=_COLOURS[verdict], label=verdict) for verdict in shown], fontsize=7)
    marked = set(kept)
    labels = [f"{layer.receiver_layer}{'*' * (layer.receiver_layer in marked)}" for layer in report.layers]
    axes[-1].set_xticks(places, labels, fontsize=7)
    axes[-1].set_xlabel("receiver layer (* kept)" if marked else "receiver layer", fontsize=7)
    for each in axes:
        each.axhline(0, color="black", linewidth=0.8)
        each.tick_params(axis="y", labelsize=7)
        each.yaxis.label.set_size(7)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(Path(path), picture.getvalue())
