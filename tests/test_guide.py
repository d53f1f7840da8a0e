"""The training guide's commands and snippets run as they stand, on tiny models that lie where it looks for models."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from guides import COLOURS, follow, package_source, read_guide, refusals, save_hotpotqa, save_models

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig
from lcf_fast.adapter import parameter_shapes
from lcf_fast.training.data import parse_example
from lcf_fast.training.settings import TrainingSettings

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

GUIDE, BLOCKS = read_guide("training.md")


def make_files(folder: Path) -> None:
    """What the guide finds in the folder that it is followed in."""
    save_models(folder)
    items = [
        {"conversations": [{"from": "human", "value": f"Say {word} {i}."}, {"from": "gpt", "value": word}]}
        for i in range(60)
        for word in COLOURS
    ]
    (folder / "openhermes2_5.json").write_text(json.dumps(items), encoding="utf-8")
    for name in ("hotpot_train_v1.1.json", "hotpot_dev_distractor_v1.json"):
        save_hotpotqa(folder / name)


def test_the_guide_works_from_data_to_a_pruned_adapter_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    variables: dict[str, str] = {}
    commands: list[str] = []
    printed = []
    for language, text in BLOCKS:
        if language == "bash":
            commands += [words[1] for words in follow(text, variables)]
        elif language == "python":
            capsys.readouterr()
            exec(compile(text, "docs/training.md", "exec"), {"__name__": "guide"})
            printed.append(capsys.readouterr().out)
    assert set(commands) == {"convert", "cache", "train", "inspect", "prune"}
    assert len(printed) == 2
    sent = re.match(r"(\d+) bytes\n", printed[1])
    assert sent is not None
    assert int(sent[1]) > 2 * 128

    # What the guide says that one finds.
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {"log.jsonl", "checkpoints", "adapter", "held_out.json"}
    kept = {name: LatentCacheFlow.from_pretrained(name).receiver_layers.tolist() for name in ("small", "small-x")}
    assert [len(layers) for layers in kept.values()] == [int(variables["KEEP"])] * 2
    for picture in ("gates.png", "layers.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    shown = next(json.loads(text) for language, text in BLOCKS if language == "json" and '"step"' in text)
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert list(shown) == list(last)
    assert shown["step"] == last["step"]
    stored = [json.loads(line)["loss"] for line in (tmp_path / "run-stored/log.jsonl").read_text().splitlines()]
    online = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert stored == online  # one epoch: bitwise


def test_the_guide_is_whole() -> None:
    assert [language for language, _ in BLOCKS].count("bash") >= 8
    assert GUIDE.count("```") == 2 * (len(BLOCKS) + 1)  # and one without a language, which installs
    lines = next(text for language, text in BLOCKS if language == "json" and "messages" in text).splitlines()
    assert [type(parse_example(json.loads(line), "line-1")).__name__ for line in lines] == [
        "SharedExample",
        "SharedExample",
        "CrossExample",
    ]


def test_what_is_refused_is_what_the_package_says() -> None:
    said = refusals(GUIDE)
    assert len(said) > 18
    source = package_source()
    for fragment in said:
        assert fragment in source, fragment


def test_the_defaults_are_the_ones_in_the_table() -> None:
    mine, crossing = TrainingSettings(), TrainingSettings.cross_context()
    config, cross = (
        LCFConfig(CacheGeometry(1, 1, 8), CacheGeometry(1, 1, 8), cross_context=crosses) for crosses in (False, True)
    )
    rates = f"{mine.learning_rate:.0e}".replace("e-0", "e-")
    expected = {
        "`--steps`, `--batch-size`": f"{mine.steps}, {mine.batch_size} ({crossing.steps}, {crossing.batch_size})",
        "`--max-tokens`": str(mine.max_tokens),
        "`--bottleneck`": str(config.bottleneck),
        "`--gate-init`": f"{config.gate_init:.0f}, closed ({cross.gate_init:.0f}, open)",
        "`--layer-map`": f"`{config.layer_map}`",
        "`--gate-temperature`": f"{mine.gate_temperature_start:g} to {mine.gate_temperature_end:g}, geometrically",
        "`--micro-batch-size`": str(mine.micro_batch_size),
        "`--learning-rate`, `--weight-decay`, `--warmup`, `--clip-norm`, `--dropout`, `--seed`": (
            f"{rates}, {mine.weight_decay:g}, {mine.warmup:g}, {mine.clip_norm:g}, {config.dropout:g}, {mine.seed}"
        ),
    }
    rows = dict(re.findall(r"^\| (`--.*?) \| (.*?) \|", GUIDE, re.MULTILINE))
    assert {name: rows.get(name) for name in expected} == expected


def test_the_figures_follow_from_the_formulas() -> None:
    sharer, receiver = CacheGeometry(24, 2, 64), CacheGeometry(28, 8, 128)
    config = LCFConfig(sharer, receiver)
    parameters = sum(math.prod(shape) for shape in parameter_shapes(config, receiver.layers).values())
    assert f"({parameters:,} for the pair above" in GUIDE
    theirs, mine = (2 * model.layers * model.channels * 2 for model in (sharer, receiver))
    assert f"`2 × 24 × 128 × 2 = {theirs:,}` bytes of the sharer and `2 × 28 × 1024 × 2 = {mine:,}` of the" in GUIDE
    read = TrainingSettings().steps * TrainingSettings().batch_size
    told = " ".join(GUIDE.split())
    terabytes = f"{read * 300 * (theirs + mine) / 1e12:.1f} TB, or {read * 300 * theirs / 1e12:.1f} TB"
    assert f"{read:,} examples: at 300 tokens a prompt, say, {terabytes}" in told
    for row, amount in (
        ("16 P", f"{16 * parameters / 1e6:.0f} MB"),
        ("12 P", f"{12 * parameters / 1e6:.0f} MB"),
        ("and the gradient", f"{(theirs + 4 * mine) / 1e3:.0f} KB × b × N"),
        ("several times over in the backward", f"{4 * 151936 / 1e3:.0f} KB × b × R"),
        ("halves it", f"{4 * parameters / 1e6:.0f} MB"),
    ):
        assert f"{row} | {amount} |" in GUIDE


@pytest.mark.slow
def test_the_guide_in_a_shell(tmp_path: Path) -> None:
    """All of it by bash, torchrun too, as a user would."""
    make_files(tmp_path)
    script = ["set -euo pipefail"]
    for language, text in BLOCKS:
        if language == "bash":
            script.append(text)
        elif language == "python":
            script.append(f"python - <<'GUIDE_END'\n{text}\nGUIDE_END")
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ((tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("run", "run-two"))
    for mine, other in zip(one, two, strict=True):
        assert json.loads(other)["loss"] == pytest.approx(json.loads(mine)["loss"], rel=1e-5)
