"""Split, combine, labels: you see the tree and both halves."""

import pytest

from jlora import lora

PARAMS = {
    "embed_tokens": {"embedding": "e"},
    "layers": {"q_proj": {"kernel": "w", "lora_a": "a", "lora_b": "b", "lora_scale": "s"}},
}


def test_split_and_combine():
    frozen, trainable = lora.split(PARAMS)
    assert frozen == {"embed_tokens": {"embedding": "e"}, "layers": {"q_proj": {"kernel": "w", "lora_scale": "s"}}}
    assert trainable == {"layers": {"q_proj": {"lora_a": "a", "lora_b": "b"}}}
    assert lora.combine(frozen, trainable) == PARAMS


def test_labels_and_strip():
    labels = lora.labels(PARAMS)
    assert labels["layers"]["q_proj"] == {
        "kernel": "frozen",
        "lora_a": "lora_a",
        "lora_b": "lora_b",
        "lora_scale": "frozen",
    }
    assert lora.strip(PARAMS) == {"embed_tokens": {"embedding": "e"}, "layers": {"q_proj": {"kernel": "w"}}}


def test_an_adapter_laid_over_another():
    adapter = {"layers": {"q_proj": {"lora_a": "a", "lora_b": "b", "lora_scale": "s"}}}
    assert lora.adapter_leaves(PARAMS) == adapter
    assert lora.overlay(PARAMS, lora.adapter_leaves(PARAMS)) == PARAMS
    assert lora.overlay(PARAMS, {}) == lora.strip(PARAMS)
    other = {"layers": {"v_proj": {"lora_a": "c", "lora_scale": "t"}}, "score": {"trained_kernel": "k"}}
    laid = lora.overlay(PARAMS, other)
    assert laid == {
        "embed_tokens": {"embedding": "e"},
        "layers": {"q_proj": {"kernel": "w"}, "v_proj": {"lora_a": "c", "lora_scale": "t"}},
        "score": {"trained_kernel": "k"},
    }
    assert lora.adapter_leaves(laid) == other
    with pytest.raises(ValueError, match="layers/q_proj/kernel"):
        lora.overlay(PARAMS, PARAMS)


def test_halves_that_overlap_are_refused():
    with pytest.raises(ValueError, match="layers/q_proj/lora_a"):
        lora.combine(PARAMS, {"layers": {"q_proj": {"lora_a": "other"}}})
