"""New rows of an embedding, or columns of a head, for chosen tokens (`trainable_token_indices`)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.errors import UserError, number_of
from jlora.lora.kinds.kind import Call, Kind, Leaf, Output, Start, row
from jlora.lora.kinds.product import A
from jlora.lora.matching import matches
from jlora.lora.sites import tie, with_prefixes
from jlora.types import Params

ROWS = Leaf("lora_tokens", trained=True, axes=("tokens", "width"), peft="token_adapter.trainable_tokens_delta")
IDS = Leaf("lora_token_ids", axes=("tokens",))


class TokenRows(Kind):
    """The tokens `lora_token_ids` have the rows `lora_tokens` instead of the embedding's or the head's."""

    leaves = (ROWS, IDS)
    title = "trained token rows"
    peft_type = "LORA"
    peft_field = "trainable_token_indices"
    marked = False

    def start(self, start: Start) -> dict[str, jax.Array]:
        chosen, leaves = start.config.trainable_token_indices, start.leaves
        pair = tie(leaves)
        if pair is None:
            raise UserError("trainable_token_indices: the tree has no input embedding that jlora knows")
        named = chosen if isinstance(chosen[0], tuple) else ((pair.embedding.split("/")[-1], chosen),)
        found: dict[str, jax.Array] = {}
        for item, tokens in named:
            module, rows = _place(leaves, item)
            if bad := [token for token in tokens if not 0 <= token < rows.shape[0]]:
                raise UserError(f"trainable_token_indices: {bad} are outside the vocabulary of {rows.shape[0]}")
            if f"{module}/{A.name}" in leaves:
                raise UserError(
                    f"trainable_token_indices: {module} is adapted by LoRA already (as in PEFT, one or the other)"
                )
            ids = jnp.asarray(np.array(tokens, np.int32))
            found |= {f"{module}/{IDS.name}": ids, f"{module}/{ROWS.name}": rows[ids].astype(jnp.float32)}
        return found

    def changes(self, module: Mapping[str, Any]) -> set[str]:
        return {"kernel", "embedding"} & module.keys() if ROWS.name in module else set()

    def output(self, output: Output, call: Call) -> Output:
        """In a head, the new rows are columns of the logits."""
        if ROWS.name not in call.module:
            return output
        y = output.total()
        return Output(self._columns(y, call.x, call.module))

    def rows(self, rows: jax.Array, tokens: jax.Array, module: Params) -> jax.Array:
        if ROWS.name not in module:
            return rows
        matching = tokens[..., None] == row(module[IDS.name], tokens.ndim + 1)
        new = matching.astype(rows.dtype) @ module[ROWS.name].astype(rows.dtype)
        return jnp.where(jnp.any(matching, axis=-1, keepdims=True), new, rows)

    def logits(self, logits: jax.Array, x: jax.Array, module: Params) -> jax.Array:
        return self._columns(logits, x, module) if ROWS.name in module else logits

    def merged(self, value: jax.Array, name: str, module: Params) -> jax.Array:
        if name not in self.changes(module):
            return value
        return replaced_rows(value, module, rows=name == "embedding")

    def _columns(self, y: jax.Array, x: jax.Array, module: Params) -> jax.Array:
        new = x @ module[ROWS.name].astype(x.dtype).T
        return y.at[..., module[IDS.name]].set(new.astype(y.dtype))


TOKENS = TokenRows()


def replaced_rows(weight: jax.Array, module: Params, *, rows: bool) -> jax.Array:
    """The weight with the module's new rows in place; as columns, unless `rows`."""
    ids, new = module[IDS.name], module[ROWS.name].astype(weight.dtype)
    return weight.at[ids].set(new) if rows else weight.at[:, ids].set(new.T)


def _place(leaves: Mapping[str, Any], item: str) -> tuple[str, jax.Array]:
    """(the one module that the item names, its weight [V, D])."""
    places = [
        path.rpartition("/")
        for path in leaves
        if path.rpartition("/")[2] in ("kernel", "embedding")
        and matches(with_prefixes(path.rpartition("/")[0].replace("/", ".")), (item,))
    ]
    if len(places) != 1:
        raise UserError(f"trainable_token_indices: {item!r} names {number_of(len(places), 'module')}, expected one")
    module, _, name = places[0]
    weight = leaves[f"{module}/{name}"]
    if tree.stacks_of(leaves)(module) or weight.ndim != 2:
        raise UserError(
            f"trainable_token_indices: {item!r} is {module}/{name} {tuple(weight.shape)}; only an embedding and a "
            "head have rows of tokens"
        )
    return module, weight if name == "embedding" else weight.T
