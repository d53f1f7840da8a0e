"""`lcf-fast train` and `lcf-fast cache`, from folders and JSON lines to an adapter; under torchrun as well."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizers import CHATML, INST, tiny_tokenizer
from tiny_training import read_log, tiny_model, tiny_settings

from lcf_fast import CacheGeometry, LatentCacheFlow, LatentSlots, LCFConfig
from lcf_fast.cli import main
from lcf_fast.training import caching, commands
from lcf_fast.training.batches import ExampleData
from lcf_fast.training.commands import layer_list
from lcf_fast.training.data import ExampleSet, read_examples
from lcf_fast.training.models import geometry_of, load_config, load_model, load_tokenizer, longest_sequence
from lcf_fast.training.step import OnlinePrefills, TrainingStep
from lcf_fast.training.trainer import Trainer

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--steps", "3", "--batch-size", "4", "--micro-batch-size", "2", "--max-tokens", "128", "--bottleneck", "64"]
SMALL += ["--precision", "fp32", "--device", "cpu", "--learning-rate", "1e-3", "--held-out", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of different tokenizers, and data of both kinds."""
    root = tmp_path_factory.mktemp("cli")
    makers: dict[str, tuple[str, dict[str, Any]]] = {
        "sharer": ("qwen2", {"template": INST, "merges": False}),
        "receiver": ("qwen3", {"template": CHATML}),
    }
    for seed, (name, (kind, options)) in enumerate(makers.items()):
        tokenizer = tiny_tokenizer("bytes", **options)
        tokenizer.save_pretrained(root / name)
        tiny_model(kind, seed, len(tokenizer)).save_pretrained(root / name)
    words = ["red", "blue", "green", "grey", "white", "black", "pink"]
    shared = [{"prompt": f"Say {word} {i}", "response": word} for i, word in enumerate(words)]
    crossing = [
        {
            "sharer_context": [f"The sky is {word}.", f"The sea is {words[i - 1]}."],
            "receiver_context": "It is a day.",
            "question": "The sky?",
            "answer": word,
        }
        for i, word in enumerate(words)
    ]
    for name, rows in (("shared", shared), ("cross", crossing)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def arguments(folder: Path, command: str, out: Path, kind: str, *more: str) -> list[str]:
    models = ["--sharer", str(folder / "sharer"), "--receiver", str(folder / "receiver")]
    crossing = ["--cross-context"] if kind == "cross" else []
    mine = SMALL if command == "train" else SMALL[:8] + SMALL[10:14] + SMALL[16:]
    return [command, *models, "--data", str(folder / f"{kind}.jsonl"), "--out", str(out), *crossing, *mine, *more]


@pytest.mark.parametrize("kind", ["shared", "cross"])
def test_train_then_cache_then_train_on_what_is_cached(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, "train", tmp_path / "run", kind)) == 0
    shown = capsys.readouterr()
    log = read_log(tmp_path / "run")
    assert shown.out.startswith(f"{tmp_path / 'run' / 'adapter'}: ")
    assert shown.out.rstrip().endswith(f"loss {log[-1]['loss']:.4f} after 3 steps")
    assert f"7 examples ({kind} context)" in shown.err
    assert "step 3 of 3" in shown.err
    adapter = LatentCacheFlow.from_pretrained(tmp_path / "run" / "adapter")
    assert adapter.config.cross_context == (kind == "cross")
    assert adapter.config.bottleneck == 64

    assert main(arguments(folder, "cache", tmp_path / "store", kind, "--dry-run")) == 0
    planned = capsys.readouterr().out
    assert not (tmp_path / "store").exists()
    assert main(arguments(folder, "cache", tmp_path / "store", kind)) == 0
    made = capsys.readouterr().out
    assert made.startswith(planned)
    assert planned.startswith("7 examples, ")
    stored = sum(path.stat().st_size for path in (tmp_path / "store").glob("*.safetensors"))
    assert stored / 1000 == pytest.approx(float(planned.split(": ")[1].split()[0]), abs=2)  # the shard's header
    assert " kB in 1 shards" in planned

    again = arguments(folder, "train", tmp_path / "again", kind, "--cached", str(tmp_path / "store"), "--quiet")
    assert main(again) == 0
    assert capsys.readouterr().err == ""
    assert read_log(tmp_path / "again")[0] == log[0]  # the first epoch bitwise, later ones to rounding
    for one, other in zip(read_log(tmp_path / "again"), log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    between = [LatentCacheFlow.from_pretrained(tmp_path / run / "adapter").trained_between for run in ("run", "again")]
    assert between[0] == between[1]
    assert between[0].keys() == {"sharer", "receiver"}

    tiny_tokenizer("bytes", template=INST, merges=False).save_pretrained(tmp_path / "other")
    tiny_model("qwen2", 8, len(load_tokenizer("sharer", str(folder / "sharer")))).save_pretrained(tmp_path / "other")
    more = ["--cached", str(tmp_path / "store"), "--sharer", str(tmp_path / "other")]
    assert main(arguments(folder, "train", tmp_path / "third", kind, *more)) == 2
    assert "the sharer that the store was made with" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "third").exists()


def test_sequences_end_where_the_models_positions_do(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = {role: load_config(role, str(folder / role)) for role in ("sharer", "receiver")}  # of 128 positions each
    limits = ((2048, None), (100, None), (2048, 128))
    assert [longest_sequence(configs, *each) for each in limits] == [128, 100, 128]
    for command in ("train", "cache"):
        assert main(arguments(folder, command, tmp_path / "run", "shared", "--max-tokens", "129")) == 2
        assert "--max-tokens: expected 128 at most, the max_position_embeddings of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_options_reach_what_they_are_for(folder: Path, tmp_path: Path) -> None:
    more = ["--keep-layers", "1", "--layer-map", "0,0", "--dropout", "0", "--gate-init", "0.5"]
    more += ["--gate-temperature", "2", "0.5", "--save-every", "1", "--keep", "3", "--weight-decay", "0.2"]
    more += ["--warmup", "0.5", "--clip-norm", "2", "--seed", "7"]
    assert main(arguments(folder, "train", tmp_path / "run", "shared", *more)) == 0
    adapter = LatentCacheFlow.from_pretrained(tmp_path / "run" / "adapter")
    assert (adapter.receiver_layers.tolist(), adapter.sharer_layers.tolist()) == ([1], [0])
    assert (adapter.config.dropout, adapter.config.gate_init) == (0.0, 0.5)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(checkpoints) == 3
    settings = json.loads((checkpoints[-1] / "state.json").read_text())["settings"]
    wanted: dict[str, Any] = {
        "steps": 3,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_tokens": 128,
        "learning_rate": 1e-3,
    }
    wanted |= {"weight_decay": 0.2, "warmup": 0.5, "clip_norm": 2.0, "seed": 7, "precision": "fp32"}
    wanted |= {"gate_temperature_start": 2.0, "gate_temperature_end": 0.5}
    assert {name: settings[name] for name in wanted} == wanted

    begun = ["--init-from", str(tmp_path / "run" / "adapter"), "--learning-rate", "0"]
    base = [a for a in arguments(folder, "train", tmp_path / "on", "shared") if a not in ("--bottleneck", "64")]
    assert main([*base, *begun]) == 0
    after = LatentCacheFlow.from_pretrained(tmp_path / "on" / "adapter")
    assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), after.parameters(), strict=True))


def prepared(folder: Path, tmp_path: Path, command: str, kind: str, *more: str) -> Any:
    """What a command makes of its arguments; of SMALL's those of size alone."""
    parser = argparse.ArgumentParser()
    commands_of = parser.add_subparsers()
    commands.add_train_command(commands_of)
    commands.add_cache_command(commands_of)
    given = arguments(folder, command, tmp_path / "out", kind, "--quiet", *more)
    at = given.index("--held-out") if "--held-out" in given else len(given)
    return commands._prepare(parser.parse_args(given[:at] + given[at + 2 :]), shown=False, first=True)


def test_what_is_held_out_unless_it_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that no more of it is looked at than is to be."""
    fractions: list[float] = []
    right = ExampleSet.held_out

    def held_out(self: ExampleSet, fraction: float) -> tuple[ExampleSet, ExampleSet]:
        fractions.append(fraction)
        kept, held = right(self, 0.7)
        assert len(held) > 1
        return kept, held

    monkeypatch.setattr(ExampleSet, "held_out", held_out)
    monkeypatch.setattr(commands, "_HELD_OUT", 1)
    for kind in ("shared", "cross"):
        run = prepared(folder, tmp_path, "train", kind, "--batch-size", "1", "--micro-batch-size", "1")
        assert run.held_out.settings.steps == 1
    assert fractions == [0.01, 0.0]


def test_a_limit_draws_by_the_seed(folder: Path, tmp_path: Path) -> None:
    path = folder / "shared.jsonl"
    for seed in ("3", "4"):
        more = ["--limit", "4", "--seed", seed, "--batch-size", "4"]
        run = prepared(folder, tmp_path, "train", "shared", *more)
        wanted = read_examples(path, limit=4, seed=int(seed)).held_out(0.01)[0]
        assert {id for step in range(3) for id in run.data.ids(step)} == {example.id for example in wanted.examples}
    assert read_examples(path, limit=4, seed=3).examples != read_examples(path, limit=4, seed=4).examples


def test_a_smaller_batch_than_the_micro_batch_is_one(folder: Path, tmp_path: Path) -> None:
    models = ["--sharer", str(folder / "sharer"), "--receiver", str(folder / "receiver"), "--out", str(tmp_path)]
    parser = argparse.ArgumentParser()
    commands.add_train_command(parser.add_subparsers())
    for batch, micro in (("2", 2), ("5", 4)):
        given = ["train", *models, "--data", str(folder / "shared.jsonl"), "--quiet", "--steps", "1"]
        run = commands._prepare(parser.parse_args([*given, "--batch-size", batch]), shown=False, first=True)
        assert run.settings.micro_batch_size == micro


def test_a_store_has_what_its_arguments_ask_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(folder, tmp_path, "cache", "shared", "--layer-map", "0,1", "--keep-layers", "1")
    assert run.sharer_layers == (1,)
    more = ["--layer-map", "0,1", "--keep-layers", "1", "--sharer-only", "--shard-mb", "3", "--quiet"]
    plans: list[dict[str, Any]] = []
    right = caching.plan_prefills

    def plan(*given: Any, **named: Any) -> Any:
        plans.append(named)
        return right(*given, **named)

    monkeypatch.setattr(caching, "plan_prefills", plan)
    assert main(arguments(folder, "cache", tmp_path / "store", "shared", *more, "--dry-run")) == 0
    wanted = {"sharer_layers": (1,), "with_receiver": False, "shard_bytes": 3_000_000}
    assert {name: plans[0][name] for name in wanted} == wanted


def test_a_run_that_begins_with_an_adapter(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of half precision, and with one of its layers alone; one of the other kind is refused."""
    sharer, receiver = (geometry_of(role, load_config(role, str(folder / role))) for role in ("sharer", "receiver"))
    first = LatentCacheFlow(LCFConfig(sharer, receiver, bottleneck=64, gate_init=1.0)).bfloat16()
    first.save_pretrained(tmp_path / "first")
    begun = ["--init-from", str(tmp_path / "first"), "--learning-rate", "0"]
    base = [a for a in arguments(folder, "train", tmp_path / "run", "shared") if a not in ("--bottleneck", "64")]
    assert main([*base, *begun, "--keep-layers", "1"]) == 0
    again = LatentCacheFlow.from_pretrained(tmp_path / "run" / "adapter")
    assert again.receiver_layers.tolist() == [1]
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, first.get_parameter(name)[1:].float()), name
    capsys.readouterr()
    base = [a for a in arguments(folder, "train", tmp_path / "other", "cross") if a not in ("--bottleneck", "64")]
    assert main([*base, *begun]) == 2
    assert "--init-from: expected an LCF-X or slots adapter" in capsys.readouterr().err
    LatentSlots(LCFConfig(sharer, receiver, bottleneck=64, slots=2)).save_pretrained(tmp_path / "slots")
    begun = ["--init-from", str(tmp_path / "slots"), "--keep-layers", "1"]
    assert main([*base, *begun]) == 2
    assert "--keep-layers: expected all layers with slots" in capsys.readouterr().err
    wider = LCFConfig(sharer, CacheGeometry(3, 2, 16), bottleneck=64)
    LatentCacheFlow(wider).save_pretrained(tmp_path / "first")
    base = [a for a in arguments(folder, "train", tmp_path / "other", "shared") if a not in ("--bottleneck", "64")]
    assert main([*base, "--init-from", str(tmp_path / "first")]) == 2
    assert "error: receiver: expected an adapter for" in capsys.readouterr().err


def test_a_run_goes_on_where_it_stopped(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(arguments(folder, "train", whole, "shared", "--save-every", "1", "--keep", "9")) == 0
    assert main(arguments(folder, "train", run, "shared", "--save-every", "1", "--keep", "9", "--resume")) == 0
    for path in (run / "adapter", run / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000002"):
        path.rename(tmp_path / path.name)
    capsys.readouterr()
    assert main(arguments(folder, "train", run, "shared")) == 2
    assert "resume" in capsys.readouterr().err
    assert main(arguments(folder, "train", run, "shared", "--resume")) == 0
    assert (run / "adapter/adapter.safetensors").read_bytes() == (whole / "adapter/adapter.safetensors").read_bytes()
    assert read_log(run) == read_log(whole)


def test_a_run_does_not_go_on_with_other_texts_of_the_same_lines(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "set.jsonl", tmp_path / "run"
    text = (folder / "shared.jsonl").read_text()
    data.write_text(text)
    base = arguments(folder, "train", run, "shared", "--data", str(data), "--save-every", "1", "--keep", "9")
    assert main(base) == 0
    (run / "checkpoints" / "step-00000003").rename(tmp_path / "last")
    capsys.readouterr()
    option = ["--template-options", '{"thinking": false}']
    for changed, more in ((text.replace('"response": "red"', '"response": "rot"'), []), (text, option)):
        data.write_text(changed)
        assert main([*base, "--resume", *more]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"lcf-fast train: error: data: expected the data of {run / 'checkpoints'}")
    data.write_text(text)
    assert main([*base, "--resume"]) == 0


def test_an_adapter_says_which_template_options_it_was_trained_with(folder: Path, tmp_path: Path) -> None:
    told = ["--template-options", '{"thinking": false}']
    assert main(arguments(folder, "train", tmp_path / "told", "shared", *told)) == 0
    assert LatentCacheFlow.from_pretrained(tmp_path / "told" / "adapter").trained_template_options == {
        "thinking": False
    }
    assert main(arguments(folder, "train", tmp_path / "not", "cross")) == 0
    assert LatentCacheFlow.from_pretrained(tmp_path / "not" / "adapter").trained_template_options == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sharer", "no/such-folder/here"], "sharer no/such-folder/here: expected the folder or hub id"),
        (["--data", "nothing.jsonl"], "no such file"),
        (["--batch-size", "8"], "8"),
        (["--steps", "0"], "steps"),
        (["--keep-layers", "5"], "--keep-layers: expected receiver layers in [0, 2), got 5"),
        (["--layer-map", "sideways"], "layer_map"),
        (["--bottleneck", "7"], "bottleneck"),
        (["--init-from", "nowhere"], "--bottleneck"),
        (["--cached", "nowhere"], "manifest.json"),
        (["--cross-context"], "cross"),
        (["--guard-margin", "2"], "--guard-margin: expected --guard-weight along with it"),
        (["--split", "test"], "split: expected a hub's data set beside it"),
        (["--device", "foo"], "--device: expected a name such as cpu or cuda:0, got 'foo'"),
        (["--device", "cuda:99"], "--device: expected"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, "train", tmp_path / "run", "shared", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lcf-fast train: error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_broken_lines_are_named_even_when_quiet(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (folder / "shared.jsonl").read_text().splitlines()
    long = json.dumps({"id": "long", "prompt": "word " * 200, "response": "x"})
    (tmp_path / "set.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:], long]))
    more = ["--data", str(tmp_path / "set.jsonl"), "--quiet"]
    assert main(arguments(folder, "train", tmp_path / "run", "shared", *more)) == 0
    error = capsys.readouterr().err
    assert "1 broken line (2: " in error
    assert "long" in error
    assert main(arguments(folder, "train", tmp_path / "other", "shared", *more, "--on-error", "refuse")) == 2


def test_the_loss_on_what_was_held_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--held-out", "0.4", "--batch-size", "2", "--micro-batch-size", "1"]
    assert main(arguments(folder, "train", tmp_path / "run", "shared", *more)) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    found = json.loads((tmp_path / "run" / "held_out.json").read_text())
    examples = read_examples(folder / "shared.jsonl")
    held = examples.held_out(0.4)[1]
    assert 0 < found["examples"] == len(held) < len(examples)
    assert shown.startswith(f"{len(held)} examples held out, {found['response_tokens']} response tokens: loss ")

    # The receiver alone, and with the adapter in use, an example at a time.
    sharer, receiver = (tiny_loaded(folder / name) for name in ("sharer", "receiver"))
    adapter = LatentCacheFlow.from_pretrained(tmp_path / "run" / "adapter")
    data = ExampleData(held, sharer[1], receiver[1], tiny_settings(steps=1, batch_size=1, micro_batch_size=1))
    step = TrainingStep(adapter, receiver[0], OnlinePrefills(sharer[0], receiver[0]))
    batches = [data.of([example.id]) for example in held.examples]
    tokens = sum(int(batch.response_mask.sum()) for batch in batches)
    assert found["response_tokens"] == tokens
    assert found["edited"] == pytest.approx(sum(step(batch).item() for batch in batches) / tokens, rel=1e-5)
    with torch.no_grad():
        adapter.gate_logit.fill_(-1.0)
    assert found["alone"] == pytest.approx(sum(step(batch).item() for batch in batches) / tokens, rel=1e-5)
    assert found["alone"] != found["edited"]

    assert main(arguments(folder, "cache", tmp_path / "store", "shared", *more)) == 0
    again = [*more, "--cached", str(tmp_path / "store")]
    assert main(arguments(folder, "train", tmp_path / "again", "shared", *again)) == 0
    assert "held out: not measured" in capsys.readouterr().out


def tiny_loaded(folder: Path) -> tuple[Any, Any]:
    return load_model("model", str(folder), "fp32").requires_grad_(False), load_tokenizer("model", str(folder))


def test_ctrl_c_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Trainer._step

    def interrupted(self: Trainer, step: int) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(arguments(folder, "train", tmp_path / "run", "shared", "--save-every", "1"))
    assert caught.value.code == 130
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped; --resume goes on from {newest}"


def test_a_store_is_made_by_one_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(folder, "cache", tmp_path / "store", "shared")) == 2
    assert "one process" in capsys.readouterr().err


@pytest.mark.parametrize("absent", ["foo", "cuda:99"])
def test_a_store_is_made_on_a_device_that_is_there(
    absent: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--device", absent, "--quiet"]
    assert main(arguments(folder, "cache", tmp_path / "store", "shared", *more)) == 2
    assert capsys.readouterr().err.startswith("lcf-fast cache: error: --device: expected ")
    assert not (tmp_path / "store").exists()
    assert main(arguments(folder, "cache", tmp_path / "store", "shared", *more, "--dry-run")) == 0


def test_layers_as_an_argument(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert layer_list("6,8-10") == (6, 8, 9, 10)
    with pytest.raises(SystemExit):
        main(arguments(folder, "train", tmp_path / "run", "shared", "--keep-layers", "six"))
    assert "expected layers such as 6,8-10, got 'six'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(arguments(folder, "train", tmp_path / "run", "shared", "--template-options", "[1]"))
    assert "expected a JSON object, got '[1]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "cache"])
def test_help_has_examples_and_loads_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from lcf_fast.cli import main\n"
        f"try: main(['{command}', '--help'])\n"
        "finally: print('heavy:', {'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "\nexamples:\n" in shown
    assert "heavy: set()" in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.slow
def test_torchrun_as_a_user_would(folder: Path, tmp_path: Path) -> None:
    """Two processes: the loss curve of one, the same files from rank 0 alone, and one answer to bad input."""
    assert main(arguments(folder, "train", tmp_path / "one", "cross", "--save-every", "1")) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*torchrun, "-m", "lcf_fast.cli", *arguments(folder, "train", tmp_path / "two", "cross")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after 3 steps") == 1
    for one, other in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert other["tokens"] == one["tokens"]
    assert LatentCacheFlow.from_pretrained(tmp_path / "two" / "adapter").config.cross_context
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert again.returncode != 0
    assert "lcf-fast train: error: out: expected a folder without a run" in again.stderr
