"""Attention: one signature, and a table of the forms that compute it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jlora import sharding
from jlora.errors import UserError
from jlora.kernels.attention import blocked, plain, splash, spread, triton
from jlora.kernels.attention.marks import Kept, Marks, Scores
from jlora.kernels.attention.spread import TOKENS_SPLIT
from jlora.kernels.device import target
from jlora.types import SAVED

__all__ = ["AUTO", "FORMS", "TOKENS_SPLIT", "Marks", "attend", "require"]

AUTO = "auto"


class Form(NamedTuple):
    """One way to compute attention.

    Attributes:
        forward: (rule, queries, keys, values, marks) → (output, log of each query's sum of weights).
        backward: (rule, what was kept, the output's gradient) → gradients of queries, keys and values.
        fits: (marks, width of a head or None) → why the form cannot be used, or "".
        device: the kind of device that it runs on; None: any.
        masks: whether it forms masks outside of kernels.
    """

    forward: Callable
    backward: Callable
    fits: Callable[[Marks, int | None], str] = lambda marks, width: ""
    device: str | None = None
    masks: bool = True


def _interpreted(module: Any) -> Form:
    parts = (functools.partial(part, interpret=True) for part in (module.forward, module.backward))
    return Form(*parts, module.fits)


def _on(device: str, platform: str, module: Any) -> Form:
    """A form for programs compiled for one platform; compiled for another, the same program uses `blocked`."""

    def part(name: str) -> Callable:
        def run(rule: Scores, *arrays: Any) -> Any:
            here, elsewhere = (functools.partial(getattr(form, name), rule) for form in (module, blocked))
            return jax.lax.platform_dependent(*arrays, **{platform: here}, default=elsewhere)

        return run

    return Form(part("forward"), part("backward"), module.fits, device)


FORMS = {
    "plain": Form(plain.forward, plain.backward),
    "blocked": Form(blocked.forward, blocked.backward),
    "splash": _on("tpu", "tpu", splash),
    "splash_interpreted": _interpreted(splash),
    "triton": _on("gpu", "cuda", triton)._replace(masks=False),
    "triton_interpreted": _interpreted(triton)._replace(masks=False),
}
# Device → its forms, best first: the first that can be used is used. "plain" is passed over if the scores of a block
# of queries would be more than PLAIN numbers.
BEST = {"cpu": ("plain", "blocked"), "gpu": ("plain", "triton", "blocked"), "tpu": ("splash", "plain", "blocked")}
PLAIN = {"cpu": 1 << 25, "gpu": 1 << 22, "tpu": 1 << 22}


def attend(
    queries: Float[Array, "B T H F"],
    keys: Float[Array, "B S K F"],
    values: Float[Array, "B S K F"],
    marks: Marks,
    scale: float,
    softcap: float | None = None,
    form: str = AUTO,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H F"]:
    """softmax(scale · q·k) @ v over the keys that `marks` let a query see; scores and softmax are float32.

    Each key head serves H/K query heads.

    Args:
        softcap: scores become softcap · tanh(scores / softcap) (Gemma 2).
        form: a name of FORMS, or "auto" for the best form on the device.
        sinks: a score for each query head that takes part in the softmax, as that of a key whose value is zero
            (gpt-oss). A query that sees no key then gives zeros.

    Raises:
        UserError: the form cannot be used here.
    """
    rule = Scores(scale, softcap)
    return spread.run(functools.partial(_on_rows, rule, form), queries, keys, values, marks, sinks)


def _on_rows(
    rule: Scores,
    form: str,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    marks: Marks,
    sinks: jax.Array | None,
) -> jax.Array:
    batch, tokens, heads, width = queries.shape
    grouped = queries.reshape(batch, tokens, keys.shape[2], heads // keys.shape[2], width).transpose(0, 2, 3, 1, 4)
    name = _chosen(form, marks, heads, width)
    keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
    if FORMS[name].masks:
        # Keeps what depends on marks alone from being computed once for all layers: the blocks' masks together would be
        # the whole mask.
        marks, grouped = jax.lax.optimization_barrier((marks, grouped))
    if sinks is not None:
        sinks = sinks.reshape(grouped.shape[1:3])
    y = _attend(rule, name, grouped, keys, values, marks, sinks)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, width)


def require(form: str, device: str, marks: Marks | None = None, heads: int = 1, width: int | None = None) -> None:
    """Raises UserError if a form of attention cannot be used here.

    It may be unknown, not run on this kind of device ("cpu", "gpu", "tpu"), or, on the mesh in context, not compute
    attention by `marks` (or their shapes) with this many heads of this width.
    """
    if form != AUTO and form not in FORMS:
        raise UserError(f"found the attention form {form!r}; expected one of {', '.join((AUTO, *FORMS))}")
    only = None if form == AUTO else FORMS[form].device
    if only not in (None, device):
        raise UserError(f"the attention form {form!r} runs on a {only}, and this is a {device}; {AUTO!r} runs anywhere")
    if form != AUTO and marks is not None and (fault := FORMS[form].fits(spread.own(marks, heads), width)):
        raise UserError(f"the attention form {form!r} cannot be used here: {fault}")


def _chosen(form: str, marks: Marks, heads: int, width: int | None = None) -> str:
    """The form to use."""
    if form != AUTO:
        require(form, target(), marks, heads, width)
        return form
    device = target()
    for name in BEST[device]:
        large = name == "plain" and _scores(marks, heads) > PLAIN[device]
        if not large and not FORMS[name].fits(marks, width):
            return name
    return "blocked"


def _scores(marks: Marks, heads: int) -> int:
    """How many scores the plain form holds at once on one device."""
    batch, (tokens, size) = marks.positions.shape[0], marks.size
    pieces = max(1, min(4, tokens // 64)) if marks.aligned else 1
    axes = sharding.HEADS if marks.aligned else sharding.FEATURES
    ways = sharding.ways(*sharding.split(batch, sharding.ROWS), *sharding.split(heads, axes))
    return batch * heads * (tokens // pieces) * size // ways


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    rule: Scores,
    form: str,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    marks: Marks,
    sinks: jax.Array | None,
) -> jax.Array:
    """[B, K, G, T, F] from queries [B, K, G, T, F], keys and values [B, K, S, F], and sinks [K, G]."""
    return _computed(rule, form, queries, keys, values, marks, sinks)[0]


def _computed(rule: Scores, form: str, *arrays: jax.Array | Marks | None) -> tuple[jax.Array, Float[Array, "B K G T"]]:
    """(the output, the log of each query's sum of weights, that of the sink included).

    No form knows of sinks: one more weight divides the output, and the forms' backward passes take their weights from
    the sum. That the sink's value is zero leaves their sum of output times gradient as it is.
    """
    *seen, sinks = arrays
    y, log_totals = FORMS[form].forward(rule, *seen)
    if sinks is None:
        return y, log_totals
    sinks = sinks.astype(jnp.float32)[None, :, :, None]
    share = jax.nn.sigmoid(log_totals - sinks)[..., None]
    return (y * share).astype(y.dtype), jnp.logaddexp(log_totals, sinks)


def _attend_forward(
    rule: Scores, form: str, *arrays: jax.Array | Marks | None
) -> tuple[jax.Array, tuple[Kept, jax.Array | None]]:
    y, log_totals = _computed(rule, form, *arrays)
    y, log_totals = checkpoint_name(y, SAVED), checkpoint_name(log_totals, SAVED)
    *seen, sinks = arrays
    return y, (Kept(*seen, y, log_totals), sinks)


def _attend_backward(rule: Scores, form: str, residuals: tuple[Kept, jax.Array | None], grad: jax.Array) -> tuple:
    kept, sinks = residuals
    return *FORMS[form].backward(rule, kept, grad), None, _grad_sinks(kept, sinks, grad)


def _grad_sinks(kept: Kept, sinks: jax.Array | None, grad: jax.Array) -> jax.Array | None:
    """-Σ weight of the sink · output · gradient: a higher score takes from the output, and gives nothing for it."""
    if sinks is None:
        return None
    weights = jnp.exp(sinks.astype(jnp.float32)[None, :, :, None] - kept.log_totals)
    products = jnp.sum(grad.astype(jnp.float32) * kept.y.astype(jnp.float32), axis=-1)
    return -jnp.sum(weights * products, axis=(0, 3)).astype(sinks.dtype)


_attend.defvjp(_attend_forward, _attend_backward)
