"""Tokenizers made on the spot, with chat templates; import as ``from tiny_tokenizers import ...``."""

from __future__ import annotations

from typing import Any

CORPUS = [
    "One two three. Four five!\n\nSix seven.\nEight.  Nine, é😀 漢字。完\r\n\r\nTen eleven twelve.",
    "user assistant system You are a helpful assistant. What is the capital of France? Paris.",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]

#: As Qwen3's: no system's turn unless there is one.
CHATML = """{%- for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if thinking is defined and not thinking %}<think>

</think>

{% endif %}{% endif %}"""
#: As Qwen2.5's, which writes a system's turn of its own.
CHATML_SYSTEM = (
    """{%- if messages[0]['role'] != 'system' %}<|im_start|>system
You are a helpful user.<|im_end|>
{% endif %}"""
    + CHATML
)
#: As Llama 2's: the system's turn within the user's, contents trimmed, no name of a role, and a token at the start.
INST = """{{ bos_token }}{%- for m in messages %}{%- if m['role'] == 'system' %}[INST] <<SYS>>
{{ m['content'] | trim }}
<</SYS>>

{% elif m['role'] == 'user' %}{% if not loop.first and messages[loop.index0 - 1]['role'] == 'system' %}
{%- else %}[INST] {% endif %}{{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] | trim }} </s>{% endif %}
{%- endfor %}"""


def tiny_tokenizer(
    kind: str = "bytes", *, template: str | None = CHATML, bos: bool = False, merges: bool = True, **keywords: Any
) -> Any:
    """A fast transformers tokenizer: BPE over bytes, or over characters (``"metaspace"``), or a token a character.

    ``"trimmed"`` is that over bytes, with offsets that leave white space out. Without ``merges`` each byte is a token.
    With ``bos`` texts begin with ``<s>`` where special tokens are added.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "characters":
        vocabulary = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *map(chr, range(9, 0x250))])}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        made.add_special_tokens(SPECIAL)
    else:
        made = Tokenizer(models.BPE(unk_token=None))
        if kind == "metaspace":
            made.pre_tokenizer = pre_tokenizers.Metaspace()
            made.decoder = decoders.Metaspace()
            alphabet = sorted({*"".join(CORPUS), *map(chr, range(10, 127)), "▁"})
        else:
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=420 if merges else 0, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(CORPUS, trainer)
        if kind == "trimmed":
            made.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        framed = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        before = [] if made.post_processor is None else [made.post_processor]
        made.post_processor = processors.Sequence([*before, framed])
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", **keywords}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    wrapped.chat_template = template
    return wrapped
