"""Training on judged answers: DPO, CPO, ORPO, KTO and reward models, which differ in data and objective."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jlora import data, lora, sharding
from jlora.errors import UserError
from jlora.models import Model
from jlora.train.algorithms import cpo, dpo, kto, reward_model
from jlora.train.algorithms.algorithm import Base, FileSource, Job, Note, Numbers, Plan, checksum
from jlora.train.config import RunConfig
from jlora.train.state import TrainState
from jlora.train.step import Batch, Metrics, Objective


@dataclasses.dataclass(frozen=True)
class Method:
    """What distinguishes one algorithm from another.

    Attributes:
        kind: of data, "pairs" or "unpaired".
        objective: (model, settings of the run) → what is minimised.
        report: (a step's metrics) → numbers for the log.
        reference: whether it uses a reference policy.
        panels: panels of curves.png.
        finish: (base, metrics of the evaluation) → None, called at the end if there is evaluation data.
    """

    kind: str
    objective: Callable[[Model, RunConfig], Objective]
    report: Callable[[Metrics], Numbers]
    reference: bool = False
    panels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    finish: Callable[[Base, Metrics], None] | None = None


REWARDS = (
    ("Rewards", ("rewards/chosen", "rewards/rejected")),
    ("Reward accuracy", ("rewards/accuracies",)),
    ("Reward margin", ("rewards/margins",)),
)
METHODS = {
    "dpo": Method("pairs", dpo.objective, dpo.report, reference=True, panels=REWARDS),
    "cpo": Method("pairs", cpo.cpo_objective, cpo.report, panels=REWARDS),
    "orpo": Method("pairs", cpo.orpo_objective, cpo.report, panels=REWARDS),
    "kto": Method(
        "unpaired", kto.objective, kto.report, reference=True, panels=(REWARDS[0], ("KL", ("kl",)), REWARDS[2])
    ),
    "reward": Method(
        "pairs",
        reward_model.objective,
        reward_model.report,
        panels=(
            ("Accuracy", ("accuracy",)),
            ("Reward", ("min_reward", "mean_reward", "max_reward")),
            ("Margin", ("margin",)),
        ),
        finish=reward_model.plot_calibration,
    ),
}


def plan(config: RunConfig, tokenizer: Any, note: Note) -> Plan:
    """The run on the preferences of `data.path`."""
    method, train = METHODS[config.algorithm], config.train
    items, encoded = read_items(config, config.data.path, tokenizer, note)
    held_out = read_items(config, config.data.eval_path, tokenizer, note)[0] if config.data.eval_path else []
    _check_references(config, items, held_out)
    steps = _steps(config, items, epochs=train.epochs, steps=train.steps)
    note(f"{len(items)} {'pairs' if method.kind == 'pairs' else 'answers'}, {data.describe(encoded, steps)}")
    documents = [document for item in items for document in item.documents]
    longest = max(len(one.tokens) for one in (*documents, *(one for item in held_out for one in item.documents)))
    start = functools.partial(_start, config, items, steps, held_out, note)
    return Plan(len(steps), start, longest, checksum(documents))


def fullest(config: RunConfig) -> Plan:
    """A plan of one step on items of documents of the maximum length that share nothing; no data needs more memory."""
    train, known = config.train, {}
    if METHODS[config.algorithm].kind == "unpaired":
        documents, known = 1, {"label": 1.0}
    else:
        documents = 2
        if config.dpo.precompute_ref_log_probs:
            known = {dpo.CHOSEN: 0.0, dpo.REJECTED: 0.0}
    item = data.Item((data.filled(train.seq_len),) * documents, known)
    items = _with_others(config, [item] * (2 * train.batch_size * train.grad_accum))
    steps = _steps(config, items, epochs=None, steps=1)
    return Plan(1, functools.partial(_start, config, items, steps, (), lambda message: None), train.seq_len)


def _steps(
    config: RunConfig, items: Sequence[data.Item], *, epochs: int | float | None, steps: int | None
) -> list[data.Step]:
    train = config.train
    return data.plan_items(
        items,
        seq_len=train.seq_len,
        batch_size=train.batch_size,
        grad_accum=train.grad_accum,
        packing=config.data.packing,
        bucket=config.data.bucket,
        seed=train.seed,
        epochs=epochs,
        steps=steps,
        share=shares(config),
    )


def _start(
    config: RunConfig,
    items: Sequence[data.Item],
    steps: Sequence[data.Step],
    held_out: Sequence[data.Item],
    note: Note,
    base: Base,
) -> Job:
    method = METHODS[config.algorithm]
    objective = method.objective(base.model, config)
    train_items, eval_items = items, held_out
    if method.reference:
        note(f"the reference policy is {_reference_name(config, items)}")
        if config.dpo.precompute_ref_log_probs and dpo.CHOSEN not in items[0].values:
            train_items, eval_items = (with_reference(base, config, some) for some in (items, held_out))
    evaluate = functools.partial(evaluate_items, sharding.jit(_scorer(objective)), config, base, eval_items)
    return Job(
        trainable=base.trainable,
        frozen=base.constants,
        objective=objective,
        source=FileSource(
            data.item_loader(train_items, steps, config.train.grad_accum),
            base.mesh,
            sides=2 if method.kind == "pairs" else 1,
        ),
        report=method.report,
        adapters=lambda trainable: {"adapter": lora.combine(base.frozen, trainable)},
        evaluate=lambda state: _numbers(method, evaluate(state)),
        panels=method.panels,
        finish=(lambda state: method.finish(base, evaluate(state))) if method.finish and held_out else _nothing,
    )


def read_items(config: RunConfig, path: str, tokenizer: Any, note: Note) -> tuple[list[data.Item], data.EncodeReport]:
    """The items of a file in the form that the algorithm needs, and a report on their encoding.

    Raises:
        UserError: the file brings the reference's log-probabilities, but dpo.ld_alpha is set.
    """
    kind = METHODS[config.algorithm].kind
    on_error = config.data.on_error
    records = data.read_preferences(path, kind, on_error=on_error, note=note)
    encode = data.encode_pairs if kind == "pairs" else data.encode_unpaired
    seq_len, overlong = config.train.seq_len, config.data.overlong
    items, report = encode(records, tokenizer, seq_len=seq_len, overlong=overlong, on_error=on_error, note=note)
    for remark in report.notes:
        note(remark)
    if dpo.CHOSEN in items[0].values and config.dpo.ld_alpha is not None:
        raise UserError(
            f"{path} brings the reference's log-probabilities of whole answers, which dpo.ld_alpha cannot weigh token "
            "by token: leave out ref_chosen_logps and ref_rejected_logps, or dpo.ld_alpha"
        )
    return _with_others(config, items), report


def _with_others(config: RunConfig, items: Sequence[data.Item]) -> list[data.Item]:
    """The items; for KTO's estimate of the KL, each with a second document: its prompt with another item's answer."""
    if config.algorithm == "kto" and config.kto.loss_type == "kto":
        return data.with_mismatched(items, config.train.batch_size, seq_len=config.train.seq_len)
    return list(items)


def _check_references(config: RunConfig, items: Sequence[data.Item], held_out: Sequence[data.Item]) -> None:
    """Raises UserError if the rewards of training and evaluation would be relative to two different references."""
    brings = [dpo.CHOSEN in some[0].values for some in (items, held_out) if some]
    if METHODS[config.algorithm].reference and len(set(brings)) > 1:
        paths = (config.data.path, config.data.eval_path)
        having, lacking = paths if brings[0] else reversed(paths)
        raise UserError(
            f"{having} brings the reference's log-probabilities ({dpo.CHOSEN}, {dpo.REJECTED}) and {lacking} does not: "
            "rewards would be against two references; give both files these fields, or neither"
        )


def shares(config: RunConfig) -> bool:
    """Whether the answers to a prompt share one copy of it, which a loss on the prompt itself does not allow."""
    return config.data.share_prompts and not (config.algorithm == "orpo" and config.orpo.nll_on_prompt)


def evaluate_items(
    score: Callable, config: RunConfig, base: Base, items: Sequence[data.Item], state: TrainState
) -> Metrics:
    """The metrics of all items as if they were one step: sums are added, arrays of items concatenated.

    The loss is the mean of the batches' losses, weighted by their numbers of items.

    Args:
        score: see `_scorer`.
    """
    found = []
    for batch in _batches(items, config, base.mesh):
        value, report = score(state.trainable, base.constants, batch)
        weight = float(np.sum(batch["items"]))
        found.append(sharding.on_host((value * weight, weight, report)))
    loss = sum(value for value, _, _ in found) / sum(weight for _, weight, _ in found)
    sums = jax.tree.map(lambda *values: np.asarray(np.sum(values, axis=0)), *(report.sums for _, _, report in found))
    arrays = jax.tree.map(lambda *values: np.concatenate(values), *(report.items for _, _, report in found))
    return sums | arrays | {"loss": np.asarray(loss)}


def with_reference(base: Base, config: RunConfig, items: Sequence[data.Item]) -> list[data.Item]:
    """The pairs with the reference's log-probabilities added to their values."""
    score = sharding.jit(functools.partial(dpo.reference_sums, base.model, ld_alpha=config.dpo.ld_alpha))
    found: list[data.Item] = []
    for batch in _batches(items, config, base.mesh):
        rows = jax.tree.map(lambda leaf: leaf[0], batch)
        sums = sharding.on_host(score(base.constants, rows)).reshape(2, -1)[:, np.asarray(rows["items"]) > 0]
        for chosen, rejected in sums.T:
            item = items[len(found)]
            found.append(
                dataclasses.replace(
                    item, values=item.values | {dpo.CHOSEN: float(chosen), dpo.REJECTED: float(rejected)}
                )
            )
    return found


def _batches(items: Sequence[data.Item], config: RunConfig, mesh: jax.sharding.Mesh) -> Iterator[Batch]:
    """Every item once, in order, in batches of one micro-batch."""
    if not items:
        return
    steps = data.plan_items(
        items,
        seq_len=config.train.seq_len,
        batch_size=config.train.batch_size,
        grad_accum=1,
        packing=False,
        bucket=config.data.bucket,
        epochs=1,
        shuffle=False,
        share=shares(config),
    )
    for step in steps:
        yield sharding.put_batch(data.collate_items(items, step, 1), mesh)


def _scorer(objective: Objective) -> Callable:
    """score(trainable, frozen, batch of one micro-batch) → (loss, report), without gradients or dropout."""

    def score(trainable: Any, frozen: Any, batch: Batch) -> Any:
        micro = jax.tree.map(lambda leaf: leaf[0], batch)
        return objective.loss(trainable, frozen, micro, objective.totals(batch), None)

    return score


def _numbers(method: Method, metrics: Metrics) -> Numbers:
    return {"loss": float(metrics["loss"])} | method.report(metrics)


def _nothing(state: TrainState) -> None:
    """Does nothing at the end of a run."""


def _reference_name(config: RunConfig, items: Sequence[data.Item]) -> str:
    if dpo.CHOSEN in items[0].values:
        return f"the one whose log-probabilities are in {config.data.path}"
    name = f"the adapter {config.model.adapter}" if config.model.adapter else "the base model"
    return f"{name}, scored once before the first step" if config.dpo.precompute_ref_log_probs else name
