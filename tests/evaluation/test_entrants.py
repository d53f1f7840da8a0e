"""Who takes part under which control: whose cache is read, by which adapter, and what its cells depend on."""

from __future__ import annotations

from tiny_agents import adapter_of, agent

from lcf_fast.channels import Agent
from lcf_fast.channels.lcf import Sharer
from lcf_fast.evaluation.entrants import entrants


def test_as_its_own_sharer_the_receiver_reads_with_what_was_trained_so() -> None:
    receiver, sharer = agent("me", "qwen3", 1), agent("a", "qwen2", 2)
    theirs = {name: adapter_of(sharer, receiver, cross_context=name == "lcf_x") for name in ("lcf", "lcf_x")}
    ours = {name: adapter_of(receiver, receiver, cross_context=name == "lcf_x") for name in theirs}
    made = entrants(receiver, sharer, adapters=[*theirs.values()], own_adapters=[*ours.values()], text_tokens=(3,))
    tried = [one for one in made if one.name in ("text_3", *theirs)]
    assert len(tried) == 3
    for entrant in tried:
        assert "self" in entrant.controls and "mismatched" in entrant.controls
        for control in entrant.controls:
            (reader,) = entrant.make(control).sharers.values()  # type: ignore[attr-defined]
            who: Agent = reader.agent if isinstance(reader, Sharer) else reader
            assert who.name == "a" and who.model is (receiver if control == "self" else sharer).model
            if isinstance(reader, Sharer):
                assert reader.adapter is (ours if control == "self" else theirs)[entrant.name]


def test_a_message_in_another_dtype_or_of_other_spans_is_another_cell() -> None:
    receiver, sharer = agent("me", "qwen3", 1), agent("a", "qwen2", 2)
    adapter = adapter_of(sharer, receiver, cross_context=True)

    def settings(**given: str | tuple[str, ...]) -> list[object]:
        made = entrants(receiver, sharer, adapters=[adapter], **given)  # type: ignore[arg-type]
        return [one.settings for one in made if one.name == "lcf_x"]

    assert settings() == settings(dtype="bfloat16") != settings(dtype="float16")
    assert settings() == settings(spans=("paragraphs",)) != settings(spans=("one",))
