"""Evaluation: the loss on completions, and how often a model's generated texts are right."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora import data, sharding
from jlora.errors import UserError
from jlora.generate import generate
from jlora.lora.bank import refuse_chosen
from jlora.losses import token_scores
from jlora.models import Model
from jlora.sharding import on_host, put_batch
from jlora.types import Params

# The numbers of a set of records, what an answer holds besides its scores, and names that no metric may use.
NUMBERS = ("loss", "perplexity", "token_accuracy", "tokens", "n", "dropped")
ANSWER = ("id", "prompt", "target", "text")
RESERVED = (*NUMBERS, *ANSWER, "exact_match", "scale")
BUCKET = 64  # row lengths are multiples of this


def evaluate(
    model: Model,
    params: Params,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seq_len: int = 512,
    generate_texts: bool = True,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Numbers about the records as a whole, and one answer for each record (none if `generate_texts` is False).

    The numbers are `loss` (the mean over the completion tokens, in nats), `perplexity`, `token_accuracy`, `tokens`, `n`
    (records) and `dropped` (records that the loss leaves out); with texts also the mean `exact_match`. An answer is a
    dict with `prompt`, `target`, `text`, `exact_match`, and the record's `id` if it has one. `metrics.scored` adds what
    a metric of one's own says of them.

    Args:
        seq_len: longer records are cut there for the loss (not for generation), which leaves out those whose completion
            begins after it.
        mesh: splits the batches of the loss, as in training.

    Raises:
        ValueError: no completion has a token within `seq_len`, or the model has too few positions for the texts.
    """
    sums = record_sums(model, params, tokenizer, records, batch_size=batch_size, seq_len=seq_len, mesh=mesh)
    numbers = _means(sums) | {"n": float(len(records)), "dropped": float(np.sum(sums.tokens == 0))}
    if not generate_texts:
        return numbers, []
    prompts = [data.split_prompt(record)[0] for record in records]
    targets = [data.answer_text(record, tokenizer) for record in records]
    texts = generate(
        model,
        params,
        tokenizer,
        prompts,
        chat_template_kwargs=list(map(data.template_variables, records)),
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        batch_size=batch_size,
    )
    right = exact_match(texts, targets)
    numbers["exact_match"] = math.fsum(right) / len(right)
    ids = [{"id": record["id"]} if "id" in record else {} for record in records]
    answers = [
        {**id, "prompt": prompt, "target": target, "text": text, "exact_match": score}
        for id, prompt, target, text, score in zip(ids, prompts, targets, texts, right, strict=True)
    ]
    return numbers, answers


def exact_match(texts: Sequence[str], targets: Sequence[str]) -> list[float]:
    """1 for each text that equals its target but for spaces around it, else 0."""
    return [float(text.strip() == target.strip()) for text, target in zip(texts, targets, strict=True)]


def completion_loss(
    model: Model,
    params: Params,
    examples: Sequence[data.Example],
    *,
    batch_size: int = 8,
    seq_len: int = 512,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
    """`loss` (in nats), `perplexity` and `token_accuracy` over the trained tokens, and their number `tokens`."""
    return _means(example_sums(model, params, examples, batch_size=batch_size, seq_len=seq_len, mesh=mesh))


def _means(sums: "RecordSums") -> dict[str, float]:
    loss, correct, tokens = (math.fsum(map(float, values)) for values in sums)
    mean = loss / tokens
    perplexity = math.inf if mean >= 700 else math.exp(mean)
    return {"loss": mean, "perplexity": perplexity, "token_accuracy": correct / tokens, "tokens": tokens}


class RecordSums(NamedTuple):
    """Sums over each record's completion tokens: of -log p, of correct predictions (argmax), and of tokens."""

    loss: Float[np.ndarray, "N"]
    correct: Float[np.ndarray, "N"]
    tokens: Float[np.ndarray, "N"]


def record_sums(
    model: Model,
    params: Params,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    *,
    batch_size: int = 8,
    seq_len: int = 512,
    end: bool = True,
    mesh: jax.sharding.Mesh | None = None,
) -> RecordSums:
    """The sums of each record, in the records' order.

    Records are cut at `seq_len`; those with no completion token left have sums of 0. Texts without a prompt are read in
    windows of `seq_len` tokens instead.

    Args:
        end: see `encode_each`.

    Raises:
        ValueError: a record cannot be encoded, no completion has a token within `seq_len`, or the model has too few
            positions for the texts.
    """
    tokenizer = data.fitted(tokenizer, model.config.vocab_size)
    require_records(records)
    examples, report = data.encode(records, tokenizer, seq_len=seq_len, overlong="cut", end=end)
    sums = example_sums(model, params, examples, batch_size=batch_size, seq_len=seq_len, mesh=mesh)
    found = np.zeros((3, len(records)), np.float64)
    np.add.at(found, (slice(None), np.asarray(report.kept)), np.asarray(sums))
    return RecordSums(*found)


def encode_each(
    records: Sequence[dict[str, Any]], tokenizer: Any, *, seq_len: int, end: bool = True
) -> list[data.Example | None]:
    """The tokens of each record, cut at `seq_len`; None for records with no completion token left.

    Args:
        end: whether to add an end-of-text token, as in training.

    Raises:
        ValueError: a record cannot be encoded, or no record has a completion token left.
    """
    require_records(records)
    settings = dict(overlong="cut", window_overlap=None, end=end)
    examples, report = data.encode(records, tokenizer, seq_len=seq_len, **settings)
    of_records = dict(zip(report.kept, examples, strict=True))
    return [of_records.get(place) for place in range(len(records))]


def require_records(records: Any) -> None:
    """Raises UserError if this is not a list of records, for example a single record without a list around it."""
    if isinstance(records, str | Mapping) or not all(isinstance(record, Mapping) for record in records):
        raise UserError(f"records: found {type(records).__name__}, expected a list of records, each an object")


def example_sums(
    model: Model,
    params: Params,
    examples: Sequence[data.Example],
    *,
    batch_size: int,
    seq_len: int,
    mesh: jax.sharding.Mesh | None = None,
) -> RecordSums:
    """The sums of each example, in the examples' order.

    Args:
        seq_len: the most tokens that the model reads of an example: all but its last, which is only predicted.

    Raises:
        ValueError: the model has too few positions for the longest example, or params come from `Bank.choose`.
    """
    refuse_chosen(params, "those of Bank.alone")
    lengths = [len(example.tokens) - 1 for example in examples]
    model.require_positions(max(lengths, default=0), "seq_len")
    model.config.warn_beyond(max(lengths, default=0), "records")
    model.require_rows([example.tokens for example in examples])
    order = sorted(range(len(examples)), key=lengths.__getitem__)  # rows of similar length need little padding
    examples = [examples[index] for index in order]
    bucket = BUCKET if mesh is None else math.lcm(BUCKET, sharding.token_ways(mesh))
    settings = dict(seq_len=seq_len, batch_size=batch_size, bucket=bucket)
    steps = data.plan(sorted(lengths), packing=False, epochs=1, shuffle=False, **settings)
    found = np.zeros((3, len(order)), np.float64)
    for step in steps:
        batch = _batch(examples, step)
        sums = on_host(_row_sums(model, params, put_batch(batch, mesh) if mesh else batch))
        for row, members in enumerate(step.rows):
            for member in members:
                found[:, order[member]] = sums[:, row]
    return RecordSums(*found)


def _batch(examples: Sequence[data.Example], step: data.Step) -> data.Batch:
    """The arrays of `data.collate` for rows of at most one example each, without its last token.

    Nothing is predicted from that token, and the model may not have a position for it.
    """
    shape = (1, len(step.rows), step.length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = np.zeros(shape, np.float32)
    for row, members in enumerate(step.rows):
        for member in members:
            tokens, trained = examples[member].tokens, examples[member].trained
            place = (0, row, slice(len(tokens) - 1))
            batch["tokens"][place], batch["targets"][place] = tokens[:-1], tokens[1:]
            batch["weights"][place], batch["segment_ids"][place] = trained[1:], 1
            batch["positions"][place] = np.arange(len(tokens) - 1)
    return batch


@functools.partial(sharding.jit, static_argnums=0)
def _row_sums(model: Model, params: Params, batch: dict[str, jax.Array]) -> Float[Array, "3 B"]:
    rows = {name: values[0] for name, values in batch.items()}
    hidden, _ = model.hidden(params, rows["tokens"], rows["positions"], rows["segment_ids"], branches=False)
    weights = rows["weights"]
    scores = token_scores(model.project, model.head(params), hidden, rows["targets"], weights)
    return jnp.stack(
        [jnp.sum(part, axis=1) for part in (-scores.log_probs * weights, scores.correct * weights, weights)]
    )
