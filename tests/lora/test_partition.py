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
    # As PEFT's `create_loraplus_optimizer` has it: B's rate for what has one axis, and for B.
    kinds = {
        "frozen": ("kernel", "bias", "scale", "lora_scale", "lora_rank", "lora_base_norm", "lora_start_b", "lora_tied"),
        "lora_a": ("lora_a", "lora_tokens", "trained_kernel", "trained_embedding"),
        "lora_b": ("lora_b", "lora_bias", "lora_magnitude", "trained_bias", "trained_scale"),
    }
    for kind, names in kinds.items():
        assert lora.labels({"m": dict.fromkeys(names, 0)}) == {"m": dict.fromkeys(names, kind)}
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
