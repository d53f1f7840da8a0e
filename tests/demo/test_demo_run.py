"""`lcf-fast demo` from end to end, and what it refuses."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from lcf_fast import LatentCacheFlow, LatentSlots, Message
from lcf_fast.cli import main
from lcf_fast.demo import experiments, lessons
from lcf_fast.demo.agents import AgentSize, PlateauError, make_agent, teach_recall, teach_table
from lcf_fast.demo.channels import CHANNELS
from lcf_fast.demo.experiments import Agents, Study, carry_out, learn_receiver
from lcf_fast.demo.jobs import Display, Job, Workers, pack, unpack
from lcf_fast.demo.lessons import Lessons, Stage, train_adapter
from lcf_fast.demo.tasks import CHANCE, SecretTable, cross_items
from lcf_fast.reading.model_fingerprint import weights_sample
from lcf_fast.training.models import load_model

TINY = AgentSize(layers=1, width=32, heads=1, kv_heads=1)


def nobody(_: Any) -> None:
    """Watches nothing."""


def between(out: Path) -> dict[str, str | None]:
    """What an adapter trained between the agents of ``out`` says of them."""
    models = {role: load_model(role, str(out / "agents" / role), "fp32") for role in ("sharer", "receiver")}
    return {role: weights_sample(model) for role, model in models.items()}


def test_quick_does_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert main(["demo", "--quick", "--workers", "1", "--seed", "2", "--out", str(tmp_path / "deep" / "out")]) == 0
    assert torch.get_num_threads() == threads
    out = tmp_path / "deep" / "out"
    found = json.loads((out / "demo.json").read_text())
    assert found["quick"] and found["seed"] == 2 and found["chance"] == CHANCE
    assert [e["name"] for e in found["experiments"]] == ["LCF-X, 1 fact", "LCF, secret table"]
    said = capsys.readouterr().out
    for experiment in found["experiments"]:
        assert [c["name"] for c in experiment["channels"]] == list(CHANNELS)
        for channel in experiment["channels"]:
            accuracy = channel["accuracy"]
            assert accuracy["share"] == accuracy["right"] / accuracy["items"]
            assert accuracy["low"] <= accuracy["share"] <= accuracy["high"]
            assert channel["first_token"] > 0
        by_name = {c["name"]: c["accuracy"]["right"] for c in experiment["channels"]}
        gained, lost = experiment["verdict"]["gained"], experiment["verdict"]["lost"]
        assert gained - lost == by_name["matching message"] - by_name["another item's message"]
        assert experiment["verdict"]["sentence"] in said
    assert found["cpu"] > 0 and found["wall"] > 0
    png = (out / "demo.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", png[16:24])) > 500
    for name, kind in (("lcf-x-1-fact", True), ("lcf-secret-table", False)):
        adapter = LatentCacheFlow.from_pretrained(out / "adapters" / name)
        assert adapter.config.cross_context is kind
        assert adapter.trained_between == between(out)
    assert "A quick run: nothing has been trained long enough" in said


def test_quick_with_slots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--workers", "1", "--slots", "3", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "demo.json").read_text())
    assert [e["name"] for e in found["experiments"]] == ["LCF-X, 1 fact", "3 slots, 1 fact", "LCF, secret table"]
    assert "the sharer holds 1 fact (3 slots), the receiver two others" in capsys.readouterr().out
    adapter = LatentSlots.from_pretrained(tmp_path / "adapters" / "3-slots-1-fact")
    assert adapter.config.slots == found["experiments"][1]["slots"] == 3
    assert adapter.trained_between == between(tmp_path) and adapter.trained_placement == "append"
    message = Message.load(tmp_path / "messages" / "3-slots-1-fact.lcf")
    adapter.expand(message)
    assert message.slots == 3 and message.slot_weights is not None and message.slot_weights.shape[-1] == 2
    assert len(message.metadata["the sharer read"]) == 2
    assert (tmp_path / "messages" / "3-slots-1-fact.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--slots", "0"], "--slots"),
        (["--slots", "8", "65"], "--slots"),
        (["--facts", "0"], "--facts"),
        (["--facts", "1", "5"], "--facts"),
        (["--seed", "-1"], "--seed"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_bad_arguments_are_refused_before_work(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"lcf-fast demo: error: {named}: expected")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_refused_before_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("in the way")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("missing", ["transformers", "matplotlib", "scipy"])
def test_what_is_not_installed_is_named_before_work(missing: str, tmp_path: Path) -> None:
    code = f"import sys\nsys.modules[{missing!r}] = None\nfrom lcf_fast.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "demo", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 2, done.stderr
    assert missing in done.stderr.lower() and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_agent_that_does_not_learn_is_tried_again_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import lcf_fast.demo.agents as agents

    seeds: list[int] = []

    def make(size: AgentSize, seed: int) -> Any:
        seeds.append(seed)
        return make_agent(size, seed)

    monkeypatch.setattr(agents, "PATIENCE", 2)
    monkeypatch.setattr(agents, "CHECK_EVERY", 1)
    monkeypatch.setattr(agents, "make_agent", make)
    with pytest.raises(PlateauError, match="another seed may"):
        teach_recall(TINY, 5, most_facts=2, watch=nobody)
    assert len(seeds) == agents.ATTEMPTS == len(set(seeds))
    table = SecretTable(torch.Generator().manual_seed(0))
    with pytest.raises(PlateauError, match="learns the table"):
        teach_table(make_agent(TINY, 0), table, 0, most_facts=2, watch=nobody)


def two_facts(items: int, generator: torch.Generator) -> Any:
    return cross_items(items, 2, generator).batch()


def test_lessons_depend_on_seed_and_step_alone() -> None:
    def made(seed: int) -> Lessons:
        return Lessons(two_facts, seed, nobody)

    first, again, other = made(1), made(1), made(2)
    first.batch(0, 0)
    assert torch.equal(first.batch(7, 0).sharer_ids, again.batch(7, 0).sharer_ids)
    assert not torch.equal(first.batch(8, 0).sharer_ids, again.batch(7, 0).sharer_ids)
    assert not torch.equal(other.batch(7, 0).sharer_ids, again.batch(7, 0).sharer_ids)
    assert len(first.ids(3)) == len(first.batch(3, 0).ids)


def test_a_later_stage_has_items_and_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[torch.Tensor] = []
    seeds: list[int] = []
    said: list[str] = []

    class Trainer:
        def __init__(self, adapter: Any, receiver: Any, data: Lessons, out: Path, *, settings: Any, **_: Any) -> None:
            seeds.append(settings.seed)
            self.data = data

        def run(self) -> None:
            read.append(self.data.batch(0, 0).sharer_ids)

    monkeypatch.setattr(lessons, "Trainer", Trainer)
    stages = [(Stage(10), two_facts), (Stage(20), two_facts)]
    train_adapter(make_agent(TINY, 0), None, None, stages, seed=3, watch=said.append)
    assert said == ["step 0 of 30", "step 10 of 30"]
    assert not torch.equal(*read) and len(set(seeds)) == 2


def test_a_study_asks_what_it_was_not_trained_on_and_marks_each_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Any] = []
    asked: list[Any] = []

    def train(adapter: Any, sharer: Any, receiver: Any, lessons: Any, **_: Any) -> None:
        trained.extend(sample(500, torch.Generator().manual_seed(0)) for _, sample in lessons)

    class Channels:
        def answers(self, items: Any, other: Any) -> dict[str, torch.Tensor]:
            """Of the nth channel n are right."""
            asked.append(items)
            numbers = torch.arange(len(items.answers))
            return {name: torch.where(numbers < n, items.answers, -1) for n, name in enumerate(CHANNELS)}

    monkeypatch.setattr(experiments, "train_adapter", train)
    monkeypatch.setattr(experiments, "channels_of", lambda *_: Channels())
    agents = Agents(TINY, TINY, pack(make_agent(TINY, 0)), pack(make_agent(TINY, 1)), table_seed=5)
    found = carry_out(Study("LCF", 0, (Stage(1),), 0, seed=3), agents, nobody)
    assert {name: sum(right) for name, right in found.right.items()} == {name: n for n, name in enumerate(CHANNELS)}
    questions = [set(map(tuple, batch.receiver_ids.tolist())) for batch in (trained[0], asked[0].batch())]
    assert all(questions) and not questions[0] & questions[1]


def test_weights_survive_the_way_between_processes() -> None:
    first, second = make_agent(TINY, 0), make_agent(TINY, 1)
    unpack(second, pack(first))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def double(number: int, watch: Any) -> int:
    watch("doubling")
    if number < 0:
        raise PlateauError("number", expected="0 or more", got=str(number))
    return 2 * number


def test_jobs_give_results_in_their_order_and_errors_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with Workers(1, Display()) as workers:
        assert workers.run([Job(f"job {n}", double, (n,)) for n in (3, 1, 2)]) == [6, 2, 4]
        with pytest.raises(PlateauError, match="0 or more"):
            workers.run([Job("bad", double, (-1,))])
    said = capsys.readouterr().err
    assert said.index("job 3: doubling") < said.index("job 3: done") < said.index("job 1: doubling")


def test_processes_learn_what_one_would(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [Job(f"agent {seed}", learn_receiver, (TINY, seed, 2, 2)) for seed in (0, 1)]
    found = []
    for count in (1, 2):
        with Workers(count, Display()) as workers:
            found.append(workers.run(jobs))
    assert found[0] == found[1] and found[0][0] != found[0][1]
    assert capsys.readouterr().err.count("agent 1: done") == 2


@pytest.mark.slow
def test_the_default_shows_that_content_crosses(tmp_path: Path) -> None:
    assert main(["demo", "--out", str(tmp_path), "--seed", "0"]) == 0
    found = json.loads((tmp_path / "demo.json").read_text())
    experiments = {e["name"]: e for e in found["experiments"]}
    assert list(experiments) == ["LCF-X, 1 fact", "LCF-X, 2 facts", "LCF-X, 4 facts", "LCF, secret table"]
    for name, least in (("LCF-X, 1 fact", 0.95), ("LCF, secret table", 0.5)):
        share = {c["name"]: c["accuracy"]["share"] for c in experiments[name]["channels"]}
        assert share["matching message"] >= least, (name, share)
        assert share["facts as text"] >= 0.95, (name, share)
        for channel in ("no message", "another item's message", "zero message"):
            assert share[channel] <= CHANCE + 0.06, (name, share)
        assert experiments[name]["verdict"]["crossed"]
    assert found["cpu"] / 2 < 300  # seconds on two idle cores
