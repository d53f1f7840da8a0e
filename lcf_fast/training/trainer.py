"""The training loop: optimizer steps over micro-batches on one device or many, logged, checkpointed, resumable.

What a step computes depends on the settings, the data and the step's number alone: the learning rate, the gate
temperature, which examples it reads, how they are cut into micro-batches, and the noise of each micro-batch. Neither
the number of ranks nor a stop in between changes it, but for the order of sums over ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..config import CacheGeometry
from ..errors import GeometryError
from ..files import only_writer
from ..placement import check_placement
from ..reading.model_fingerprint import model_sample, weights_sample
from .checkpoints import Checkpoint, Checkpoints, read_state
from .distributed import Ranks
from .failures import LossError, RunError
from .log import RunLog, Scalars
from .prefills import StoredPrefills
from .progress import Progress
from .schedule import gate_temperature, learning_rate_factor
from .settings import TrainingSettings
from .step import OnlinePrefills, Prefiller, TrainingStep, frozen
from .timing import Stopwatch

if TYPE_CHECKING:
    from ..adapter import LatentCacheFlow
    from ..slots import LatentSlots
    from .batches import Batch

__all__ = ["CHECKPOINTS", "LOG_FILE", "Data", "Trainer", "check_unused"]

LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
TENSORBOARD = "tensorboard"
WRITABLE = "a folder to write to"


class Data(Protocol):
    """The examples of each step, already cut into micro-batches: the same ones whatever the number of ranks."""

    def ids(self, step: int) -> Sequence[str]:
        """The examples that step (0-based) reads, in order."""

    def batch(self, step: int, index: int) -> Batch:
        """Micro-batch ``index`` in [0, settings.micro_batches) of a step."""

    def digest(self) -> str:
        """Of all that the run reads: the same for the same tokens in the same order, and for no others."""


class Trainer:
    """Trains an adapter between two frozen models.

    Under ``torchrun`` every rank makes one, with the same arguments; rank 0 writes.

    Args:
        adapter: trained in place; moved to the device. Its parameters must be float32.
        receiver, sharer: transformers causal LMs, whose tokens `data` has. They are frozen, moved and cast in place.
            No sharer is needed with ``prefiller``.
        data: what each step reads.
        out: the run's folder: ``log.jsonl``, ``checkpoints/``, ``tensorboard/`` and at the end ``adapter/``.
        settings: the protocol.
        prefiller: gives frozen caches in place of the models' prefills (`lcf_fast.training.prefills`).
        save_every: steps from one checkpoint to the next; one is written after the last step in any case.
        keep: how many checkpoints stay.
        progress: whether rank 0 shows a progress bar on standard error.

    Raises:
        GeometryError: models of another geometry than the adapter's; fewer micro-batches than ranks.
    """

    def __init__(
        self,
        adapter: LatentCacheFlow | LatentSlots,
        receiver: Any,
        data: Data,
        out: Path | str,
        *,
        settings: TrainingSettings | None = None,
        sharer: Any = None,
        prefiller: Prefiller | None = None,
        device: torch.device | str | None = None,
        save_every: int = 50,
        keep: int = 2,
        progress: bool = True,
    ) -> None:
        self.settings = TrainingSettings() if settings is None else settings
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or self.settings.device or default)
        self.ranks = Ranks.current(self.device)
        if self.settings.micro_batches < self.ranks.count:
            raise GeometryError(
                "micro_batch_size",
                expected=f"a micro-batch a step for each of {self.ranks.count} processes",
                got=f"{self.settings.micro_batches}: {self.settings.batch_size} examples by"
                f" {self.settings.micro_batch_size}",
            )
        if save_every < 1:
            raise GeometryError("save_every", expected="1 or more", got=str(save_every))
        if (sharer is None) == (prefiller is None):
            got = "neither" if sharer is None else "both"
            raise GeometryError("sharer", expected="either the sharer or a prefiller", got=got)
        if sharer is not None and (found := CacheGeometry.of(sharer)) != adapter.config.sharer:
            raise GeometryError("sharer", expected=f"{adapter.config.sharer} as the adapter's", got=str(found))
        wrong = sorted({str(p.dtype) for p in adapter.parameters() if p.dtype != torch.float32})
        if wrong:
            raise GeometryError("adapter", expected="float32 parameters (adapter.float())", got=", ".join(wrong))

        precision = self.settings.precision
        receiver = frozen(receiver, device=self.device, precision=precision)
        self.models = {"receiver": model_sample(receiver, precision)}
        if prefiller is None:
            sharer = frozen(sharer, device=self.device, precision=precision)
            self.models["sharer"] = model_sample(sharer, precision)
            prefiller = OnlinePrefills(sharer, receiver)
        elif isinstance(prefiller, StoredPrefills):
            self.models["sharer"] = prefiller.manifest.sharer_sample
        self.adapter = adapter.to(self.device)
        between = {"receiver": receiver} if sharer is None else {"sharer": sharer, "receiver": receiver}
        samples = {role: weights_sample(model) for role, model in between.items()}
        if isinstance(prefiller, StoredPrefills):
            samples = {"sharer": prefiller.manifest.sharer_weights, **samples}
        self.adapter.trained_between = {role: sample for role, sample in samples.items() if sample is not None}
        if self.adapter.config.slots:
            cast("LatentSlots", self.adapter).trained_placement = check_placement(self.settings.placement)
        self.data, self.out, self.save_every, self.progress = data, Path(out), save_every, progress
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, keep)
        self.stopwatch = Stopwatch(self.device)
        self.prefiller = prefiller
        self.step = TrainingStep(
            self.adapter,
            receiver,
            prefiller,
            self.stopwatch,
            placement=self.settings.placement,
            slot_dropout=self.settings.slot_dropout,
            guard_weight=self.settings.guard_weight,
            guard_margin=self.settings.guard_margin,
        )
        self.optimizer = torch.optim.AdamW(
            self.adapter.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.forward: nn.Module = self.step
        if self.ranks.count > 1:
            # In training mode every parameter gets a gradient in every micro-batch, since soft gates are never shut.
            self.forward = nn.parallel.DistributedDataParallel(self.step, broadcast_buffers=False)

    def run(self, *, resume: bool = False) -> LatentCacheFlow | LatentSlots:
        """Train to the last step; returns the adapter, in eval mode, which is also saved to ``out/adapter``.

        Args:
            resume: go on from the newest checkpoint in ``out``, or begin where there is none.

        Raises:
            RunError: ``out`` holds a run already and ``resume`` is False; a run with other settings, models or data;
                another process is writing there; a full disk. LossError: a loss or gradient that is not finite; what
                there was before that step is saved.
        """
        with self._alone() if self.ranks.first else contextlib.nullcontext():
            return self._run(resume)

    def _run(self, resume: bool) -> LatentCacheFlow | LatentSlots:
        done, log_bytes = self._resume() if resume else self._begin()
        log = self._log = RunLog(self.out / LOG_FILE, log_bytes) if self.ranks.first else None
        scalars = Scalars(self.out / TENSORBOARD, done + 1) if self.ranks.first else None
        bar = Progress(self.settings.steps, done, shown=self.progress and self.ranks.first)
        self.adapter.train()
        try:
            # The noise has a seed of its own; the caller's generator is left as it was.
            with torch.random.fork_rng(devices=[]):
                for step in range(done, self.settings.steps):
                    entry = self._step(step)
                    if log is not None and scalars is not None:
                        log.write(entry)
                        scalars.write(entry)
                        bar.show(entry)
                        if (step + 1) % self.save_every == 0 or step + 1 == self.settings.steps:
                            self._save(step + 1, log.sync())
        finally:
            bar.close()
            if log is not None and scalars is not None:
                log.close()
                scalars.close()
        self.adapter.eval()
        if self.ranks.first:
            self._save_adapter()
        return self.adapter

    _log: RunLog | None = None

    # --- beginning, resuming, saving

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder: two runs in one would mix their logs and checkpoints, and sweep up each other's."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(only_writer(self.out))
            except OSError as error:
                raise RunError(str(self.out), expected=WRITABLE, got=error.strerror or str(error)) from error
            yield

    def _begin(self) -> tuple[int, int]:
        check_unused(self.out, self.ranks)
        if self.ranks.first:
            self._check_space()
        return 0, 0

    def _resume(self) -> tuple[int, int]:
        if self.ranks.first:
            self.checkpoints.sweep()
        latest = self.checkpoints.latest()
        step = self.ranks.from_first(0 if latest is None else read_state(latest)["step"])
        if step == 0:
            return 0, 0
        path = self.checkpoints.folder / f"step-{step:08d}"
        self._check_same_run(read_state(path), path)
        return step, self.checkpoints.load(path, self.adapter, self.optimizer).log_bytes

    def _check_same_run(self, state: dict[str, Any], path: Path) -> None:
        for name, digest in self.models.items():  # a prefiller of the caller's own says nothing of its sharer
            if state["models"].get(name, digest) != digest:
                raise RunError(name, expected=f"the model that {path} was trained with", got="another")
        found, mine = state["settings"], self.settings.to_dict()
        changed = [name for name in mine | found if name != "device" and found.get(name) != mine.get(name)]
        if changed:
            expected = ", ".join(f"{name} {found.get(name)}" for name in changed)
            got = ", ".join(f"{name} {mine.get(name)}" for name in changed)
            raise RunError("settings", expected=f"{expected}, as {path} has it", got=got)
        if state["data"] != self.data.digest():
            raise RunError("data", expected=f"the data of {path}", got="others, in another order, or read otherwise")

    def _check_space(self) -> None:
        """Refuse a disk that cannot hold the run's checkpoints: weights and two moments each, one more than stay."""
        needed = 3 * sum(p.nbytes for p in self.adapter.parameters()) * (self.checkpoints.keep + 1)
        try:
            free = shutil.disk_usage(self.out).free
        except OSError as error:
            raise RunError(str(self.out), expected=WRITABLE, got=error.strerror or str(error)) from error
        if free < needed:
            raise RunError(str(self.out), expected=f"{needed:,} bytes free for checkpoints", got=f"{free:,} bytes")

    def _save(self, step: int, log_bytes: int) -> None:
        checkpoint = Checkpoint(step, self.settings, log_bytes, self.data.digest(), self.models)
        self.checkpoints.save(checkpoint, self.adapter, self.optimizer)

    def _save_adapter(self) -> None:
        try:
            self.adapter.save_pretrained(self.out / ADAPTER)
        except OSError as error:
            got = f"{error.strerror or error}; it is in {self.checkpoints.latest()}"
            raise RunError(str(self.out / ADAPTER), expected=WRITABLE, got=got) from error

    # --- one step

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step (0-based); what the log says of it."""
        began = time.perf_counter()
        settings = self.settings
        rate = settings.learning_rate * learning_rate_factor(step, settings.steps, settings.warmup)
        bounds = settings.gate_temperature_start, settings.gate_temperature_end
        temperature = gate_temperature(step, settings.steps, *bounds)
        self.adapter.gate_temperature = temperature
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        mine = self.ranks.share(settings.micro_batches)
        batches = [self.data.batch(step, index) for index in mine]
        counts = [float(sum(int(b.response_mask.sum()) for b in batches))]
        counts.append(counts[0] + sum(int(b.receiver_mask.sum()) for b in batches))
        response_tokens, tokens = (round(count) for count in self.ranks.total(counts))

        self.optimizer.zero_grad(set_to_none=True)
        sums = [self._backward(step, i, batch, response_tokens, i == mine[-1]) for i, batch in zip(mine, batches)]
        norm = nn.utils.clip_grad_norm_(self.adapter.parameters(), settings.clip_norm)
        losses: list[float] = torch.stack([*sums, norm.to(sums[0])]).tolist()
        norm_value = losses.pop()
        (loss,) = self.ranks.total([sum(losses) / response_tokens])
        if not math.isfinite(loss) or not math.isfinite(norm_value):
            self._refuse(step, batches, losses, loss, norm_value)
        self.optimizer.step()

        spent = self.stopwatch.seconds()
        seconds = time.perf_counter() - began
        return {
            "step": step + 1,
            "loss": loss,
            "learning_rate": rate,
            "gate_temperature": temperature,
            "grad_norm": norm_value,
            "response_tokens": response_tokens,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "prefill_share": spent.get("prefill", 0.0) / seconds,
            "adapter_share": spent.get("adapter", 0.0) / seconds,
        }

    def _backward(self, step: int, index: int, batch: Batch, response_tokens: int, last: bool) -> Tensor:
        """Add a micro-batch's gradient; its sum of losses."""
        torch.random.default_generator.manual_seed(noise_seed(self.settings.seed, step, index))
        parallel = isinstance(self.forward, nn.parallel.DistributedDataParallel)
        # Ranks exchange gradients once a step. They average, where the sum over all tokens is wanted.
        quiet = self.forward.no_sync() if parallel and not last else contextlib.nullcontext()  # type: ignore[operator]
        with quiet:
            loss: Tensor = self.forward(batch)
            self.step.backward(loss * (self.ranks.count / response_tokens))
        return loss.detach().double()

    def _refuse(self, step: int, batches: Sequence[Batch], losses: Sequence[float], loss: float, norm: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        wrong = [batch for batch, each in zip(batches, losses) if not math.isfinite(each)]
        if math.isfinite(loss):  # the losses are fine: any of them may have the gradient that is not
            wrong = list(batches)
        ids = tuple(i for batch in wrong for i in batch.ids)
        found = f"loss {loss}, gradient norm {norm}"
        with contextlib.suppress(RunError):  # a full disk on top of it: then the last good one is an older one
            if step > 0 and self._log is not None:
                self._save(step, self._log.sync())
        raise LossError.at(step + 1, ids, self.checkpoints.latest(), found)


def check_unused(out: Path, ranks: Ranks) -> None:
    """Raises RunError if a folder holds a run."""
    held = (out / LOG_FILE).exists() or Checkpoints(out / CHECKPOINTS).latest() is not None
    if ranks.from_first(held):  # one answer for all, since rank 0 will soon write there
        raise RunError("out", expected="a folder without a run (or resume it)", got=f"{out}, which holds one")


def noise_seed(seed: int, step: int, index: int) -> int:
    """Of the gate noise and dropout of a micro-batch: by its place in the run, so that a resumed run draws the same."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {index}".encode()).digest()[:8], "big") >> 1
