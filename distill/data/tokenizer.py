"""The embedded tokenizer: one token a character (and a word), in Hugging Face format, with a chat template."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.data.families import DIGITS, FAMILIES, LETTERS

PAD, UNKNOWN, USER, ASSISTANT, END = "<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>"
THINK, END_THINK = "<think>", "</think>"
WORDS = (*FAMILIES, "from")
SYMBOLS = " +-*=()"
VOCAB_SIZE = 64  # rounded up, as real models do: ids beyond the tokenizer are never produced

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}"
    "{% if message.get('reasoning_content') %}<think>{{ message['reasoning_content'] }}</think>{% endif %}"
    "{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of the embedded teacher (56 tokens, ids below ``VOCAB_SIZE``)."""
    special = [PAD, UNKNOWN, USER, ASSISTANT, END]
    pieces = [*special, THINK, END_THINK, *WORDS, *DIGITS, *LETTERS, *SYMBOLS]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    split = "|".join([*(f"{word}(?= )" for word in WORDS), r"[\s\S]"])  # "from mod" asks for the keys m, o and d
    core.pre_tokenizer = pre_tokenizers.Split(Regex(split), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(special)
    core.add_tokens([THINK, END_THINK])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )
