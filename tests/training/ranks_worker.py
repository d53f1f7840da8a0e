"""One rank of test_distributed.py, under torchrun: ``ranks_worker.py FOLDER``, where RANK.json says what it found."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_training import KINDS, RandomData, tiny_model, tiny_settings, tiny_trainer

from lcf_fast.errors import LCFError
from lcf_fast.training.batches import Batch
from lcf_fast.training.distributed import Ranks, process_group
from lcf_fast.training.failures import LossError
from lcf_fast.training.step import OnlinePrefills, Prefill, frozen

#: Micro-batches of two, two and one example: two ranks have one and two of them.
SETTINGS = tiny_settings(steps=4, batch_size=5, micro_batch_size=2)  # as in test_distributed.py
#: In the last micro-batch of the third step, which is the last rank's.
POISONED = "14"


def poisoned(batch: Batch) -> Prefill:
    models = (frozen(tiny_model(k, s), device="cpu", precision="fp32") for k, s in (("qwen2", 1), ("qwen3", 2)))
    caches = OnlinePrefills(*models)(batch)
    if POISONED in batch.ids:
        caches.receiver[0][0].fill_(math.nan)
    return caches


def refusal(call: Any) -> str:
    try:
        call()
    except LCFError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def work(folder: Path, ranks: Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, options in KINDS.items():
        adapter = tiny_trainer(folder / kind, SETTINGS, **options).run()
        found[kind] = sum(p.detach().double().abs().sum().item() for p in adapter.parameters())
    found["again"] = refusal(lambda: tiny_trainer(folder / "same", SETTINGS).run())

    if ranks.first:
        shutil.copytree(folder / "same", folder / "resumed")
        shutil.rmtree(folder / "resumed" / "checkpoints" / "step-00000004")
    dist.barrier()
    tiny_trainer(folder / "resumed", SETTINGS).run(resume=True)

    data = RandomData(SETTINGS)
    trainer = tiny_trainer(folder / "nan", SETTINGS, data=data, prefiller=poisoned)
    try:
        trainer.run()
    except LossError as error:
        found["nan"] = [error.step, error.ids, str(error)]
    dist.barrier()
    few = tiny_settings(batch_size=2, micro_batch_size=2)
    found["few"] = refusal(lambda: tiny_trainer(folder / "few", few))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group("cpu") as device:
        ranks = Ranks.current(device)
        found = work(Path(sys.argv[1]), ranks)
        (Path(sys.argv[1]) / f"{ranks.rank}.json").write_text(json.dumps(found))
