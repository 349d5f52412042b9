"""Prints what a merge kept of an adapter."""

from collections.abc import Sequence
from typing import Any

from jlora import lora
from jlora.hub.checkpoints.score import only_scored
from jlora.models import Model
from jlora.models.model import SCORE
from jlora.train.evaluation.sensitivity import divergence
from jlora.types import Params

# Texts to compare the merged and unmerged models on if no records are given.
PROBES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b\n",
    "Water boils at a hundred degrees and freezes at zero.",
    "Dear Ms Green, thank you for your letter of the third of May.",
    '{"name": "search", "arguments": {"query": "weather in Oslo", "limit": 3}}',
    "Question: What is seven times eight? Answer: fifty-six.",
)


def print_kept(
    model: Model, params: Params, merged: Params, tokenizer: Any, records: Sequence[dict[str, Any]] | None = None
) -> lora.Kept:
    """Prints how much of the update the weights of `merged` kept, and returns it.

    It also prints how far the predictions are from the unmerged model's on the records (default: `PROBES`).
    """
    params = only_scored(model, params) if SCORE in params else params  # a reward model is written without other heads
    report = lora.kept(params, merged)
    print(report)
    records = records or [{"prompt": "", "completion": text} for text in PROBES]
    print(f"KL(unmerged ‖ merged): {divergence(model, params, merged, tokenizer, records):.2e} nats a token")
    return report
