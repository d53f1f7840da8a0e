"""The demo's agents, saved, are models like any other: channels ask them in text what the demo asks them in ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcf_fast.channels import Agent, FullContextChannel, LCFXChannel, NoneChannel, Request, Sharer
from lcf_fast.cli import main
from lcf_fast.demo.agents import AgentSize, answers_of, make_agent
from lcf_fast.demo.channels import CrossChannels
from lcf_fast.demo.export import agent_tokenizer, save_agent, save_items
from lcf_fast.demo.lessons import make_adapter
from lcf_fast.demo.tasks import VOCABULARY, characters, cross_items, written
from lcf_fast.training.data import CrossExample, read_examples


def test_the_tokenizer_has_a_token_a_character() -> None:
    tokenizer = agent_tokenizer()
    ids = torch.arange(VOCABULARY)[None]
    assert tokenizer(written(ids)[0])["input_ids"] == ids[0].tolist()
    read = tokenizer("Cf\n\nAb", return_offsets_mapping=True)
    assert read["input_ids"] == [characters().index(c) for c in "CfAb"]
    assert read["offset_mapping"] == [(0, 1), (1, 2), (4, 5), (5, 6)]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "CfA"}], tokenize=False) == "CfA"
    assert tokenizer("Z")["input_ids"] == [VOCABULARY - 1]


def test_saved_agents_answer_in_text_as_they_do_in_ids(tmp_path: Path) -> None:
    import transformers

    generator = torch.Generator().manual_seed(1)
    items = cross_items(6, 2, generator)
    agents = {}
    for name, seed, size in (("sharer", 1, AgentSize(2, 64, 2, 2)), ("receiver", 2, AgentSize(2, 64, 2, 1))):
        model = make_agent(size, seed).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0)
        save_agent(model, tmp_path / name)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        agents[name] = Agent(name, loaded, transformers.AutoTokenizer.from_pretrained(tmp_path / name))
    save_items(items, tmp_path / "items.jsonl")
    examples = read_examples(tmp_path / "items.jsonl").examples
    requests = []
    for example in examples:
        assert isinstance(example, CrossExample)
        requests.append(Request(example.question, example.receiver_context, {"sharer": example.sharer_context}))
    receiver, sharer = agents["receiver"], agents["sharer"]

    def said(channel: NoneChannel | LCFXChannel) -> list[str]:
        return [answer.text for answer in channel.answer(requests, max_new_tokens=1, do_sample=False)]

    plain = answers_of(receiver.model, items.receiver_ids)
    assert said(NoneChannel(receiver)) == written(plain[:, None])
    told = answers_of(receiver.model, torch.cat([items.sharer_ids, items.receiver_ids], 1))
    assert said(FullContextChannel(receiver)) == written(told[:, None])
    adapter = make_adapter(sharer.model, receiver.model, cross_context=True, seed=3).eval()
    with torch.no_grad():
        adapter.get_parameter("up_weight").mul_(20.0)
    theirs = CrossChannels(adapter, sharer.model, receiver.model)
    message = theirs.message(theirs_cache(sharer, items.sharer_ids), items)
    with torch.no_grad():
        expected = theirs.answer(items.receiver_ids, message)
    ours = LCFXChannel(receiver, adapter, [Sharer(sharer, adapter)])
    assert said(ours) == written(expected[:, None])
    assert written(expected[:, None]) != written(plain[:, None]), "no edit"


def theirs_cache(sharer: Agent, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with torch.no_grad():
        return sharer.read(ids, torch.ones_like(ids))


def test_the_demo_leaves_what_eval_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--workers", "1", "--out", str(out)]) == 0
    agents = ["--sharer", str(out / "agents" / "sharer"), "--receiver", str(out / "agents" / "receiver")]
    asked = ["--data", str(out / "items" / "facts-1.jsonl"), "--adapter", str(out / "adapters" / "lcf-x-1-fact")]
    how = ["--precision", "fp32", "--device", "cpu", "--max-new-tokens", "1", "--text-tokens", "2", "--limit", "20"]
    assert main(["eval", *agents, *asked, *how, "--text-instruction", "", "--out", str(tmp_path / "eval")]) == 0
    said = capsys.readouterr().out
    assert "no content shown" in said, "nothing has been learned"
    assert "`lcf_x`" in said
