"""Mixing several adapters of one base into one."""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jlora import tree
from jlora.errors import UserError, number_of
from jlora.lora.kinds import BIAS, DORA, PRODUCT, TIED, TOKENS, leaf_of
from jlora.lora.kinds.bias import LEAF as ADDED
from jlora.lora.kinds.copies import TRAINED, copy_of, original
from jlora.lora.kinds.dora import MAGNITUDE
from jlora.lora.kinds.kind import RANK, SCALE
from jlora.lora.kinds.product import A, B
from jlora.lora.low_rank import Axes, Change, Fit, Fits, as_float, best, check_rank
from jlora.lora.merging import merged_leaf
from jlora.lora.partition import adapter_leaves, overlay, strip, with_starts
from jlora.lora.sites import MAIN, Tie, tie
from jlora.lora.task_arithmetic import RULES, Rule, Sign, add_changes
from jlora.lora.vocabulary import marks, require_same_rows, without_marks
from jlora.types import Params

# Kinds of adapter that a mixture has no rule for.
UNMIXABLE = (TOKENS,)


@dataclasses.dataclass(frozen=True)
class Method:
    """How the changes of one weight become one product.

    Attributes:
        of: "factors": all factors side by side; "sum": the best product for the sum of the changes; "values": the best
            product for the `add_changes` of the changes; "each factor": the `add_changes` of all A and of all B.
        rule, as_peft: arguments of `add_changes`.
        whole_rank: whether the default rank is what the sum needs; otherwise it is the largest of the adapters' ranks.
    """

    of: str
    rule: Rule = RULES["linear"]
    as_peft: bool = False
    whole_rank: bool = False


METHODS = {
    "cat": Method("factors"),
    "svd": Method("sum"),
    "linear": Method("sum", whole_rank=True),
    **{name: Method("values", rule) for name, rule in RULES.items() if name != "linear"},
    "peft:cat": Method("factors"),
    "peft:svd": Method("sum"),
    **{f"peft:{name}": Method("each factor", rule, as_peft=True) for name, rule in RULES.items()},
    **{f"peft:{name}_svd": Method("values", RULES[name], as_peft=True) for name in RULES if name != "linear"},
}


def mix(
    params: Params,
    adapters: Mapping[str, Params] | Sequence[Params],
    weights: Sequence[int | float] | None = None,
    *,
    method: str = "cat",
    rank: int | float | None = None,
    density: int | float | None = None,
    majority_sign_method: Sign = "total",
    seed: int = 0,
) -> tuple[Params, Fits]:
    """(the params with one adapter mixed from several adapters of this base, report).

    The result replaces any adapter that `params` hold.

    What is combined are the changes that adapters make to weights, scale · A @ B, not their factors:

    "cat"               the exact weighted sum: factors side by side, so ranks add up
    "svd"               the weighted sum, at a given rank
    "linear"            the weighted sum, at the rank it needs (with DoRA, whose changes have full rank, a whole copy)
    "magnitude_prune"   the sum of the largest `density` of each change's values
    "ties"              the same, averaged over the values whose sign is the majority's (TIES, Yadav et al. 2023)
    "dare_linear"       the sum of a random `density` of each change's values, divided by it (DARE, Yu et al. 2024)
    "dare_ties"         the same, of only the values whose sign is the majority's

    All but "cat" end with the best product of `rank` (by singular values); the report says how much that keeps. The
    other leaves that adapters train (whole copies, biases) are treated as changes to the base's and combined in the
    same way; a single adapter with weight 1 gives itself. A module that one adapter copies and another adds a product
    to ends up as a copy. If the adapters do not all change a tied embedding and its head alike, the head gets leaves of
    its own. "peft:" before PEFT's name for a method ("peft:ties_svd", "peft:linear", …) does what PEFT's
    `add_weighted_adapter` does: without _svd it combines A and B separately, which is not a sum of changes.

    Args:
        params: the base, with or without an adapter.
        adapters: trees that hold adapters (params, or their `adapter_leaves`), by name or in order.
        weights: one for each adapter, default 1.
        rank: the result's rank, or a share of the energy to keep (see `low_rank.best`); default: the largest of the
            adapters' ranks, or for "linear" what the sum needs.
        density: the share of values to keep, in (0, 1], for the methods that prune.
        majority_sign_method: whether "ties" and "dare_ties" weigh signs ("total") or count them ("frequency").
        seed: the seed of "dare_linear" and "dare_ties".

    Raises:
        ValueError: settings conflict, or adapters cannot be mixed; all faults are listed.
    """
    named = adapters if isinstance(adapters, Mapping) else {str(i): one for i, one in enumerate(adapters, start=1)}
    given = tuple(weights) if weights is not None else (1.0,) * len(named)
    base = strip(params)
    flat = tree.flatten(base)
    products = [with_starts(overlay(base, adapter_leaves(adapter))) for adapter in named.values()]
    leaves = [without_marks(tree.flatten(adapter_leaves(adapter))) for adapter in products]
    if pair := tie(flat):
        leaves = _apart_where_unlike(leaves, pair)
        flat |= _tied_head(flat, leaves, pair)
    _check(flat, list(named), leaves, given, method, rank, density)
    require_same_rows(params, named)
    how = _How(METHODS[method], given, rank, density or 1.0, majority_sign_method, seed)
    found: dict[str, Any] = {}
    fits: list[Fit] = []
    for path in sorted({path.rpartition("/")[0] for adapter in leaves for path in adapter}):
        own, *members = (_module(leaf, path) for leaf in (flat, *leaves))
        copied = _copied(own, members, how)
        members = [_as_copies(own, member, copied) for member in members]
        mixed = _mixed_factors(path, own, members, how, fits) | _mixed_leaves(path, own, members, how)
        found |= {f"{path}/{name}": jnp.asarray(leaf) for name, leaf in mixed.items()}
    title = f"{method} of {', '.join(f'{weight:g} · {name}' for name, weight in zip(named, given, strict=True))}"
    return overlay(base, tree.unflatten(found | marks(params))), Fits(title, tuple(fits))


@dataclasses.dataclass(frozen=True)
class _How:
    """The settings of `mix`."""

    method: Method
    weights: tuple[int | float, ...]
    rank: int | float | None
    density: int | float
    majority_sign_method: Sign
    seed: int

    def add(self, place: str, changes: Sequence[np.ndarray], weights: Sequence[int | float]) -> np.ndarray:
        """`add_changes` with these settings; random choices depend only on the seed and `place`."""
        entropy = [self.seed, zlib.crc32(place.encode())]
        return add_changes(
            changes,
            weights,
            self.method.rule,
            density=self.density,
            majority_sign_method=self.majority_sign_method,
            as_peft=self.method.as_peft,
            generator=np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy))),
        )

    def add_present(self, place: str, changes: Sequence[np.ndarray | None]) -> np.ndarray:
        """`add` of the changes that are not None, which stands for an adapter that leaves this place alone."""
        present = [(change, weight) for change, weight in zip(changes, self.weights, strict=True) if change is not None]
        return self.add(place, *zip(*present, strict=True))


# ---------------------------------------------------------------- tied heads


def _apart_where_unlike(leaves: list[dict[str, Any]], pair: Tie) -> list[dict[str, Any]]:
    """The adapters' leaves, each update at the embedding or at the head.

    If one adapter acts in both an embedding and its tied head and another in only one of them, the parts that act in
    the head become leaves of the head.
    """
    changing = [flat for flat in leaves if any(path.startswith(f"{pair.embedding}/") for path in flat)]
    tied = [f"{pair.embedding}/{TIED.name}" in flat for flat in changing]
    if any(tied) and (not all(tied) or any(path.startswith(f"{pair.head}/") for flat in leaves for path in flat)):
        return [_apart(flat, pair) for flat in leaves]
    return leaves


def _apart(flat: dict[str, Any], pair: Tie) -> dict[str, Any]:
    mark = f"{pair.embedding}/{TIED.name}"
    if mark not in flat:
        return flat
    own = _module(flat, pair.embedding)
    turned = {A.name: B.name, B.name: A.name, copy_of("kernel"): copy_of("embedding")}
    moved = {name: own[source].T for name, source in turned.items() if source in own}
    moved |= {leaf.name: own[leaf.name] for leaf in (SCALE, RANK) if leaf.name in own}
    kept = {path: leaf for path, leaf in flat.items() if path != mark}
    return kept | {f"{pair.head}/{name}": leaf for name, leaf in moved.items()}


def _tied_head(flat: Mapping[str, Any], leaves: Sequence[Mapping[str, Any]], pair: Tie) -> dict[str, Any]:
    """The kernel of a tied head that an adapter changes, as the base of that change."""
    kernel = f"{pair.head}/kernel"
    changed = any(path.startswith(f"{pair.head}/") for adapter in leaves for path in adapter)
    return {kernel: flat[pair.weight].T} if changed and kernel not in flat else {}


# ---------------------------------------------------------------- whole copies and biases


def _copied(base: Params, adapters: Sequence[Params], how: _How) -> set[str]:
    """The leaves of a module for which all adapters' updates must become trained copies.

    These are the leaves that one adapter copies, and the weight if the sum has full rank (DoRA) and no rank is asked
    for.
    """
    every = {name for adapter in adapters for name in adapter}
    main = {name for name in MAIN if name in base}
    if not (how.method.whole_rank and how.rank is None and DORA.is_in(every)):
        main = {name for name in main if copy_of(name) in every}
    return main | ({"bias"} if BIAS.is_in(every) and (main or copy_of("bias") in every) else set())


def _as_copies(base: Params, adapter: Params, names: set[str]) -> Params:
    """The adapter with its updates of these leaves (the product, the added bias) turned into trained copies."""
    names = {name for name in names if (BIAS if name == "bias" else PRODUCT).is_in(adapter)}
    if not names:
        return adapter
    module = {name: jnp.asarray(as_float(leaf)) for name, leaf in (base | adapter).items()}
    copies = {copy_of(name): merged_leaf(module, name) for name in names}
    if names == {"bias"}:
        gone = {ADDED.name}
    else:
        gone = {name for name in adapter if not name.startswith(TRAINED)} - {TIED.name}
    return {name: leaf for name, leaf in adapter.items() if name not in gone} | copies


def _mixed_leaves(path: str, base: Params, adapters: list[Params], how: _How) -> Params:
    """A module's mixed leaves other than factors: trained copies and biases."""
    found: Params = {}
    for name in sorted({name for adapter in adapters for name in adapter if name.startswith(TRAINED)}):
        # A leaf that only adapters have (a score head) is a change from zero.
        own = as_float(base[original(name)]) if original(name) in base else np.float32(0)
        changes = [as_float(adapter[name]) - own if name in adapter else None for adapter in adapters]
        found[name] = own + how.add_present(f"{path}/{name}", changes)
    if any(map(BIAS.is_in, adapters)):
        biases = [
            as_float(adapter[ADDED.name]) * as_float(adapter[SCALE.name])[..., None] if BIAS.is_in(adapter) else None
            for adapter in adapters
        ]
        found[ADDED.name] = how.add_present(f"{path}/{ADDED.name}", biases)
    tied = [adapter[TIED.name] for adapter in adapters if TIED.name in adapter]
    return found | ({TIED.name: tied[0]} if tied else {})


# ---------------------------------------------------------------- factors


class _Update(NamedTuple):
    """One adapter's change to one weight [D, N]: scale · lora_a @ lora_b, or scale · lora_a alone if lora_b is None."""

    lora_a: np.ndarray
    lora_b: np.ndarray | None
    scale: float
    rank: int

    def change(self, weight: int | float = 1) -> Change:
        return Change(self.lora_a * np.float32(weight * self.scale), self.lora_b)


def _mixed_factors(path: str, base: Params, adapters: list[Params], how: _How, fits: list[Fit]) -> Params:
    """The mixed factors of one module, for all of its layers; what they keep of the changes is appended to `fits`."""
    adapting = [
        (adapter, weight) for adapter, weight in zip(adapters, how.weights, strict=True) if PRODUCT.is_in(adapter)
    ]
    if not adapting:
        return {}
    axes = Axes.of(adapting[0][0], _weight_axes(base))
    by_adapter = [_updates(base, adapter, axes) for adapter, _ in adapting]
    count, inputs, outputs = axes.matrices
    products = []
    for number in range(count):
        name = f"{path}[{number}]" if axes.stack else path
        present = [
            (updates[number], weight)
            for updates, (_, weight) in zip(by_adapter, adapting, strict=True)
            if updates[number] is not None
        ]
        if not present:
            products.append((np.zeros((inputs, 0), np.float32), np.zeros((0, outputs), np.float32)))
            continue
        left, right, energy, lost = _product(name, *zip(*present, strict=True), how)
        products.append((left, right))
        fits.append(Fit(name, left.shape[1], energy, lost))
    return axes.factors(products)


def _product(
    name: str, updates: Sequence[_Update], weights: Sequence[int | float], how: _How
) -> tuple[Float[np.ndarray, "D R"], Float[np.ndarray, "R N"], float, float]:
    """(A, B, energy of the change that they approximate, energy of what they miss) for one weight."""
    if how.method.of == "factors":
        whole = _side_by_side(updates, weights)
        energy = np.sum((whole.left.T @ whole.left) * (whole.right @ whole.right.T), dtype=np.float64)
        return *whole, float(energy), 0.0
    if how.method.of == "sum":
        narrow = all(update.lora_b is not None for update in updates)
        whole = _side_by_side(updates, weights) if narrow else Change(_dense_sum(updates, weights))
    else:
        whole = Change(how.add(name, [update.change().dense() for update in updates], weights))
    if how.method.of == "each factor":
        left, right = _each_factor(name, updates, weights, how)
        missed = whole.left - left @ right
        return left, right, _energy(whole.left), _energy(missed)
    ranks = [update.rank for update in updates]
    return best(whole, how.rank or (sum(ranks) if how.method.whole_rank else max(ranks)))


def _side_by_side(updates: Sequence[_Update], weights: Sequence[int | float]) -> Change:
    """The weighted sum of products as one product."""
    changes = [update.change(weight) for update, weight in zip(updates, weights, strict=True)]
    return Change(
        np.concatenate([change.left for change in changes], axis=1),
        np.concatenate([change.right for change in changes], axis=0),
    )


def _dense_sum(updates: Sequence[_Update], weights: Sequence[int | float]) -> np.ndarray:
    return np.sum([update.change(weight).dense() for update, weight in zip(updates, weights, strict=True)], axis=0)


def _each_factor(
    name: str, updates: Sequence[_Update], weights: Sequence[int | float], how: _How
) -> tuple[np.ndarray, np.ndarray]:
    """(A, B), combined separately: each is weighted by sqrt(|weight · scale|), and A also by the sign, as in PEFT."""
    factors = [weight * update.scale for update, weight in zip(updates, weights, strict=True)]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    left = how.add(f"{name}/{A.name}", [update.lora_a for update in updates], signed)
    return left, how.add(f"{name}/{B.name}", [update.lora_b for update in updates], roots)


def _energy(matrix: np.ndarray) -> float:
    return float(np.sum(matrix.astype(np.float64) ** 2))


def _updates(base: Params, adapter: Params, axes: Axes) -> list[_Update | None]:
    """The adapter's change to every weight of a module; None for layers that it leaves out."""
    count, inputs, outputs = axes.matrices
    width = adapter[A.name].shape[-1]
    ranks = axes.spread(np.asarray(adapter.get(RANK.name, np.full(axes.layers, width))))
    scales = axes.spread(as_float(adapter[SCALE.name]))
    if DORA.is_in(adapter):  # DoRA rescales every output, so its change has full rank
        main = next(name for name in MAIN if name in base)
        weight = jnp.asarray(as_float(base[main]))
        change = as_float(merged_leaf({main: weight} | adapter, main)) - as_float(weight)
        found = [(matrix, None, 1.0) for matrix in change.reshape(count, inputs, outputs)]
    else:
        left = as_float(adapter[A.name]).reshape(count, inputs, -1)
        right = as_float(adapter[B.name]).reshape(count, -1, outputs)
        found = [
            (a[:, :rank], b[:rank], float(scale)) for a, b, scale, rank in zip(left, right, scales, ranks, strict=True)
        ]
    return [_Update(*parts, int(rank)) if rank else None for parts, rank in zip(found, ranks, strict=True)]


def _weight_axes(base: Params) -> int:
    """How many axes the module's weight has."""
    return next((base[name].ndim for name in MAIN if name in base), 2)


def _module(flat: Mapping[str, Any], path: str) -> Params:
    """The leaves of one module."""
    return {name.rpartition("/")[2]: leaf for name, leaf in flat.items() if name.rpartition("/")[0] == path}


# ---------------------------------------------------------------- what cannot be mixed


def _check(
    base: dict[str, Any],
    names: list[str],
    leaves: list[dict[str, Any]],
    weights: tuple[int | float, ...],
    method: str,
    rank: int | float | None,
    density: int | float | None,
) -> None:
    faults = _setting_faults(names, weights, method, rank, density)
    for name, flat in zip(names, leaves, strict=True):
        if not flat:
            faults.append(f"adapter {name}: found none in the tree")
        faults += [
            f"adapter {name}: {path} cannot be mixed ({kind.peft_field}); merge it into the base"
            for kind in UNMIXABLE
            for path in flat
            if leaf_of(path.rpartition("/")[2]).trained and kind.holds(path.rpartition("/")[2])
        ]
    faults += _shape_faults(base, names, leaves, METHODS[method].of if method in METHODS else "")
    whole = method in METHODS and METHODS[method].whole_rank and rank is None
    faults += _bias_faults(base, leaves, whole=whole)
    if faults:
        raise UserError("these adapters cannot be mixed:\n  " + "\n  ".join(faults))


def _setting_faults(
    names: list[str],
    weights: tuple[int | float, ...],
    method: str,
    rank: int | float | None,
    density: int | float | None,
) -> list[str]:
    faults = [] if names else ["found no adapters, expected at least one"]
    if len(weights) != len(names):
        faults.append(f"weights: found {len(weights)}, expected one for each of {number_of(len(names), 'adapter')}")
    most = float(np.finfo(np.float32).max)
    faults += [
        f"weights: found {weight}, expected finite numbers of float32" for weight in weights if not abs(weight) <= most
    ]
    if method not in METHODS:
        return [*faults, f"method: found {method!r}, expected one of {', '.join(METHODS)}"]
    prunes = METHODS[method].rule.prune is not None
    if prunes and density is None:
        faults.append(f"density: is required by {method!r}, the share of values to keep")
    if density is not None and not (prunes and 0 < density <= 1):
        expected = "more than 0 and at most 1" if prunes else f"none, for {method!r} does not prune"
        faults.append(f"density: found {density}, expected {expected}")
    if rank is not None and METHODS[method].of in ("factors", "each factor"):
        faults.append(f"rank: found {rank}, expected none: {method!r} chooses its own rank")
    elif rank is not None:
        try:
            check_rank(rank)
        except UserError as error:
            faults.append(str(error))
    return faults


def _shape_faults(base: dict[str, Any], names: list[str], leaves: list[dict[str, Any]], of: str) -> list[str]:
    """Faults of adapters that are not of one base, or that this kind of method cannot take: unequal ranks, DoRA."""
    faults = []
    alike = of == "each factor"
    for path in sorted({path for flat in leaves for path in flat if path.endswith(f"/{A.name}")}):
        module = path.rpartition("/")[0]
        members = [(name, _module(flat, module)) for name, flat in zip(names, leaves, strict=True) if path in flat]
        ndim = _weight_axes(_module(base, module))
        axes = {name: Axes.of(member, ndim) for name, member in members}
        if len(set(axes.values())) > 1:
            shapes = ", ".join(f"{name} {(*a.stack, *a.inputs)} → {a.outputs}" for name, a in axes.items())
            faults.append(f"{module}: found weights of different shapes: {shapes}")
        if alike and len({member[A.name].shape for _, member in members}) > 1:
            faults.append(f"{module}: found ranks that differ, which PEFT cannot combine factor by factor")
        if of in ("factors", "each factor") and any(DORA.is_in(member) for _, member in members):
            instead = "a method that ends in _svd" if alike else "'linear', which is as exact"
            faults.append(f"{module}: found DoRA, which is not a plain product; use {instead}")
    return faults


def _bias_faults(base: dict[str, Any], leaves: list[dict[str, Any]], *, whole: bool) -> list[str]:
    """Faults of modules combined as whole copies that get a bias which the base does not have.

    One adapter is a copy or (`whole`) DoRA there, while another adds a bias.
    """
    every = {path for flat in leaves for path in flat}
    biased = sorted(path.rpartition("/")[0] for path in every if path.endswith(f"/{ADDED.name}"))
    wide = (*map(copy_of, MAIN), *([MAGNITUDE.name] if whole else []))
    return [
        f"{module}: one adapter copies it or is DoRA, another adds a bias (lora_bias) that the base lacks"
        for module in biased
        if f"{module}/bias" not in base and any(f"{module}/{name}" in every for name in wide)
    ]
