"""Whom the latency protocol times: notes and answers of exact lengths, what is built and when, and the command."""

from __future__ import annotations

import json
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import save_tiny_model

from lcf_fast import CacheGeometry, LatentCacheFlow, LCFConfig
from lcf_fast.c2c import C2CConfig, C2CFuser, FaithfulFuser
from lcf_fast.channels import Channel, LCFChannel, LCFXChannel
from lcf_fast.channels.clock import Clock
from lcf_fast.cli import main
from lcf_fast.evaluation import latency_models
from lcf_fast.evaluation.failures import EvaluationError
from lcf_fast.evaluation.latency import Protocol, requests_of, run_latency
from lcf_fast.evaluation.latency_models import CROSS, SHARED, Group, random_groups, stand_in_tokenizer

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
VOCABULARY = 700
PROTOCOL = Protocol(
    batch=3, context_tokens=23, question_tokens=5, max_new_tokens=3, rounds=1, warmup=1, brief_warmup=True
)
SHARED_NAMES = ["none", "text_3", "text_9", "lcf", "c2c", "c2c_as_released"]
CROSS_NAMES = ["none", "full_context", "text_3", "text_9", "lcf_x", "slots", "kvcomm"]


def tiny_config(role: str, **more: Any) -> Any:
    size = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, **more}
    size.setdefault("max_position_embeddings", 512)
    if role == "sharer":
        return transformers.Qwen2Config(num_hidden_layers=2, num_key_value_heads=1, **size)
    return transformers.Qwen3Config(num_hidden_layers=3, num_key_value_heads=2, head_dim=16, **size)


def tiny_groups(**more: Any) -> list[Group]:
    configs = {role: tiny_config(role) for role in ("sharer", "receiver")}
    widths = {"hidden": 32, "intermediate": 24}
    return random_groups((3, 9), device=CPU, dtype=torch.float32, bottleneck=64, c2c=widths, **{**configs, **more})


# --- the stand-in tokenizer


@pytest.mark.parametrize("size", [VOCABULARY, 151_936])
def test_what_a_model_writes_is_read_as_many_tokens(size: int) -> None:
    """Any ids at all, put into a prompt as text, come back as they were."""
    tokenizer = stand_in_tokenizer(size)
    assert len(tokenizer) == size
    ids = torch.randint(0, size, (4, 200), generator=torch.Generator().manual_seed(1))
    ids[0], ids[1], ids[2, :3], ids[2, -1] = torch.arange(200), 7, 0, size - 1  # names of roles; one word; the unknown
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [tokenizer(text.strip(), add_special_tokens=False)["input_ids"] for text in texts] == ids.tolist()
    assert tokenizer.eos_token_id is None
    words = texts[3].split()
    assert 4.9 < len(texts[3]) / len(words) < 5.1, "bytes a token"


def test_a_text_in_words_that_it_does_not_know_is_a_token_a_word() -> None:
    read = stand_in_tokenizer(VOCABULARY)("user\nWrite down what,\n\nplease.", return_offsets_mapping=True)
    assert read["input_ids"] == [1, 0, 0, 0, 0]
    assert read["offset_mapping"][1:3] == [(5, 10), (11, 15)]


# --- lengths


def prompt_length(channel: Channel, group: Group) -> int:
    requests = requests_of(group.name, PROTOCOL, channel.receiver.reader, group.words)
    with torch.no_grad():
        prepared = channel.prepare(requests, Clock(CPU), 3)
    assert prepared.mask.bool().all(), "requests of more than one length"
    return prepared.ids.shape[1]


@pytest.mark.parametrize("which", [0, 1])
def test_a_note_of_k_tokens_is_k_tokens_of_the_prompt(which: int) -> None:
    group = tiny_groups()[which]
    makers = group.open()
    alone = prompt_length(makers["none"](), group)
    assert alone == 23 + 5 + 2, "context, question, and the names of two roles"
    for k in (3, 9):
        assert prompt_length(makers[f"text_{k}"](), group) == alone + k
    if group.name == CROSS:
        assert prompt_length(makers["full_context"](), group) == alone + 23
        assert prompt_length(makers["kvcomm"](), group) == alone + 23


def test_requests_differ_and_have_one_length() -> None:
    group = tiny_groups()[1]
    reader = group.open()["none"]().receiver.reader
    requests = requests_of(CROSS, PROTOCOL, reader, group.words)
    assert len({request.question for request in requests}) == PROTOCOL.batch
    for request in requests:
        paragraphs = request.sharer_contexts["sharer"]
        assert [len(part.split()) for part in paragraphs] == [4, 5, 4, 5, 5]
        assert len(request.context.split()) == 23
        assert len(request.question.split()) == 5
    assert requests == requests_of(CROSS, PROTOCOL, reader, group.words)
    short = Protocol(1, 2, 1, 1, 1, 0, True)
    (request,) = requests_of(CROSS, short, reader, group.words)
    assert [len(part.split()) for part in request.sharer_contexts["sharer"]] == [1, 1]
    assert not requests_of(SHARED, short, reader, group.words)[0].sharer_contexts


# --- what takes part


def test_every_channel_does_something_and_both_c2cs_the_same() -> None:
    """All gates are open: what is timed is an edit, not a cache that passes through."""
    for group in tiny_groups():
        logits, fusers = {}, {}
        for name, make in group.open().items():
            channel = make()
            fusers[name] = channel.sharers["sharer"].adapter if isinstance(channel, LCFChannel) else None
            requests = requests_of(group.name, PROTOCOL, channel.receiver.reader, group.words)
            logits[name] = channel.next_logits(requests)[0]
        for name, one in logits.items():
            if name != "none":
                assert not torch.equal(one, logits["none"]), name
        if group.name == SHARED:
            torch.testing.assert_close(logits["c2c"], logits["c2c_as_released"], rtol=1e-4, atol=1e-5)
            released = fusers["c2c_as_released"]
            assert isinstance(released, FaithfulFuser)
            assert released.fuser is fusers["c2c"], "two fusers in memory"


def test_a_whole_run_on_both_groups(tmp_path: Path) -> None:
    cells = run_latency(tiny_groups(), [PROTOCOL], tmp_path, device=CPU, settings={"precision": "fp32"})
    assert [list(cell["channels"]) for cell in cells] == [SHARED_NAMES, CROSS_NAMES]
    for cell in cells:
        for name, one in cell["channels"].items():
            parts = {part: value["median"] for part, value in one["ms"].items()}
            inner = parts["sharer"] + parts["communication"] + parts["receiver"]
            assert 0 < inner <= parts["first_token"] < parts["end"], name
            assert (one["bytes"] == 0) == (name == "none")
            assert one["launches"] is None
            assert set(one["speedups"]) == {"text_3", "text_9"}
            communicates = name in ("lcf", "lcf_x", "slots", "kvcomm", "c2c", "c2c_as_released")
            assert (parts["communication"] > 0) == communicates
    shared = cells[0]["channels"]
    assert shared["c2c"]["bytes"] == shared["c2c_as_released"]["bytes"] == shared["lcf"]["bytes"]
    assert "random weights" in cells[0]["settings"]["sharer"]


def test_models_are_built_when_needed_and_freed_with_their_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = latency_models.random_model
    made: list[tuple[str, weakref.ref[Any]]] = []

    def watched(auto: Any, config: Any, *more: Any) -> Any:
        model = right(auto, config, *more)
        made.append((config.model_type, weakref.ref(model)))
        return model

    freed: list[bool] = []

    def crossing(*given: Any) -> LCFXChannel:
        freed.append(made[-1][1]() is None)
        return LCFXChannel(*given)

    monkeypatch.setattr(latency_models, "random_model", watched)
    monkeypatch.setattr(latency_models, "LCFXChannel", crossing)
    groups = tiny_groups()
    protocols = [PROTOCOL, Protocol(1, 9, 2, 1, 1, 0, True)]
    run_latency(groups, protocols, tmp_path / "a", device=CPU, channels=["none"])
    assert [kind for kind, _ in made] == ["qwen3"], "a sharer nobody asked for, or a receiver more than once"
    run_latency(groups, protocols, tmp_path / "b", device=CPU, channels=["text_3", "lcf_x"])
    assert [kind for kind, _ in made] == ["qwen3", "qwen2"]
    assert freed == [True], "the sharer outlives its group"


def test_the_default_is_the_published_pair_with_its_whole_vocabulary() -> None:
    """Nothing is built by opening."""
    shared, cross = random_groups((50, 200), device=CPU, dtype=torch.float32)
    assert list(shared.open()) == ["none", "text_50", "text_200", "lcf", "c2c", "c2c_as_released"]
    assert list(cross.open()) == ["none", "full_context", "text_50", "text_200", "lcf_x", "slots", "kvcomm"]
    assert shared.limit == 32_768
    assert cross.limit == 40_960
    assert "Qwen2.5-0.5B" in shared.settings["sharer"]
    assert all("Qwen3-0.6B" in cross.settings[role] for role in ("sharer", "receiver"))
    assert all("151,936" in group.settings["sharer"] for group in (shared, cross))
    assert len(shared.words) == 151_936 - 1 - 3


def test_two_vocabularies_are_refused() -> None:
    with pytest.raises(EvaluationError, match="one vocabulary"):
        tiny_groups(sharer=tiny_config("sharer", vocab_size=90))


# --- the command


def said_last(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_without_models_it_runs_on_random_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency_models, "published_config", tiny_config)
    # The fuser's published widths are beyond a quick test.
    monkeypatch.setattr(latency_models, "C2CConfig", partial(C2CConfig, hidden=32, intermediate=24))
    given = ["latency", "--out", str(tmp_path / "out"), "--device", "cpu", "--batch", "1", "2", "--rounds", "2"]
    given += ["--text-tokens", "3", "9"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "batch 1, contexts of 64 tokens" in printed
    assert "batch 2, contexts of 32 tokens" in printed
    table = (tmp_path / "out" / "latency.md").read_text(encoding="utf-8")
    assert table in printed
    for name in (*SHARED_NAMES, *CROSS_NAMES):
        assert f"| `{name}` |" in table
    record = json.loads((tmp_path / "out" / "latency.json").read_text(encoding="utf-8"))
    assert [(cell["group"], cell["batch"]) for cell in record["cells"]] == [
        (SHARED, 1), (SHARED, 2), (CROSS, 1), (CROSS, 2)]  # fmt: skip
    monkeypatch.setattr(latency_models, "random_model", None)  # would raise if it were called
    assert main(given) == 0
    assert main([*given, "--max-new-tokens", "5"]) == 2
    assert "max_new_tokens: 5 instead of 4" in said_last(capsys)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models all of whose tokens end a text, and what goes between them."""
    folder = tmp_path_factory.mktemp("world")
    for role, kind in (("sharer", "qwen2"), ("receiver", "qwen3")):
        save_tiny_model(folder / role, kind, seed=len(role))
        config = transformers.AutoConfig.from_pretrained(folder / role)
        ends = transformers.GenerationConfig(eos_token_id=list(range(config.vocab_size)))
        ends.save_pretrained(folder / role)
    for name, cross_context in (("lcf", False), ("lcf_x", True)):
        sides = CacheGeometry(2, 1, 16), CacheGeometry(2, 2, 16)
        LatentCacheFlow(LCFConfig(*sides, bottleneck=64, cross_context=cross_context)).save_pretrained(folder / name)
    C2CFuser(C2CConfig(*sides, hidden=16, intermediate=8)).save_pretrained(folder / "c2c")
    return folder


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    models = ["--sharer", str(world / "sharer"), "--receiver", str(world / "receiver")]
    lengths = ["--context-tokens", "30", "--question-tokens", "4", "--text-tokens", "5", "--rounds", "1"]
    return ["latency", *models, "--device", "cpu", "--batch", "2", *lengths, "--out", str(out), *more]


def test_given_models_write_as_much_as_is_asked_for(world: Path, tmp_path: Path) -> None:
    given = [f"--adapter={world / 'lcf'}", f"--adapter={world / 'lcf_x'}", f"--c2c={world / 'c2c'}"]
    assert main(arguments(world, tmp_path, *given)) == 0
    record = json.loads((tmp_path / "latency.json").read_text(encoding="utf-8"))
    channels = [list(cell["channels"]) for cell in record["cells"]]
    assert channels == [
        ["none", "text_5", "lcf", "c2c", "c2c_as_released"], ["none", "full_context", "text_5", "lcf_x"]]  # fmt: skip
    # An answer cut short would have been refused; a note cut short has few bytes.
    assert all(cell["channels"]["text_5"]["bytes"] >= 5 for cell in record["cells"])


def test_an_adapter_of_other_weights_is_not_mixed_in(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the same path: of closed gates, say, whose layers cost nothing."""
    shutil.copytree(world / "lcf", tmp_path / "lcf")
    given = [f"--adapter={tmp_path / 'lcf'}", "--channels", "none", "lcf"]
    assert main(arguments(world, tmp_path / "out", *given)) == 0
    assert main(arguments(world, tmp_path / "out", *given)) == 0
    adapter = LatentCacheFlow.from_pretrained(tmp_path / "lcf")
    with torch.no_grad():
        adapter.get_parameter("gate_logit").fill_(-1.0)
    adapter.save_pretrained(tmp_path / "lcf")
    assert main(arguments(world, tmp_path / "out", *given)) == 2
    assert "weights: ['" in said_last(capsys)


def test_one_model_on_both_sides_brings_kvcomm(world: Path, tmp_path: Path) -> None:
    same = arguments(world, tmp_path, "--channels", "none", "kvcomm")
    same[same.index("--sharer") + 1] = str(world / "receiver")
    assert main(same) == 0
    record = json.loads((tmp_path / "latency.json").read_text(encoding="utf-8"))
    assert [list(cell["channels"]) for cell in record["cells"]] == [["none"], ["none", "kvcomm"]]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--rounds", "0"], "--rounds: expected 1 or more"),
        (["--batch", "0"], "--batch: expected 1 or more"),
        (["--batch", "2", "2"], "each once"),
        (["--text-tokens", "0"], "--text-tokens"),
        (["--context-tokens", "500"], "--context-tokens: expected"),
        (["--channels", "nobody"], "some of none, text_5"),
        (["--adapter", "LCF", "--adapter", "LCF"], "two of lcf"),
        (["--adapter", "MODEL"], "config.json"),
        (["--device", "cuda"], "--device"),
        (["--device", "nonsense"], "--device"),
    ],
)
def test_bad_input_is_one_line_before_any_model_is_built(
    more: list[str],
    match: str,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("lcf_fast.evaluation.loading.load_model", None)  # would raise if it were called
    real = {"LCF": str(world / "lcf"), "MODEL": str(world / "receiver")}
    assert main(arguments(world, tmp_path / "out", *(real.get(word, word) for word in more))) == 2
    said = said_last(capsys)
    assert said.startswith("lcf-fast latency: error:")
    assert match in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--sharer", "x"], "--sharer alone"),
        (["--receiver", "x"], "--receiver alone"),
        (["--adapter", "x"], "--sharer and --receiver with --adapter"),
        (["--c2c", "x"], "--sharer and --receiver with --adapter or --c2c"),
    ],
)
def test_half_a_pair_is_refused(given: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["latency", *given]) == 2
    assert match in said_last(capsys)


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["latency", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed
    assert "--context-tokens" in printed
