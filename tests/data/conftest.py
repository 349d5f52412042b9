"""A tiny word-and-byte tokenizer with a chat template, built here so that no test needs the network."""

import pytest
import tokenizers
import transformers

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(chat_template: str | None, eos_token: str | None) -> transformers.PreTrainedTokenizerFast:
    """Bytes as tokens, and the two special tokens of ChatML."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<|im_start|>", "<|im_end|>", "<|end|>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos_token)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(CHAT_TEMPLATE, "<|im_end|>")


@pytest.fixture(scope="session")
def text_tokenizer():
    """Without a chat template, ending with a token of its own."""
    return build_tokenizer(None, "<|end|>")


@pytest.fixture(scope="session")
def make_tokenizer():
    return build_tokenizer
