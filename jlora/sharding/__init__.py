"""Device meshes, and the rules that place every leaf of a param tree on them."""

from jlora.sharding.constraints import ROWS, TOKENS, constrain, gathered, held, jit, logits_axes, mesh_of, on, ways
from jlora.sharding.mesh import (
    MeshConfig,
    Vote,
    batch_sharding,
    make_mesh,
    on_any_host,
    on_host,
    put_batch,
    replicated,
    row_ways,
)
from jlora.sharding.rules import features, leaf_sharding, shard, tree_shardings

__all__ = [
    "ROWS",
    "TOKENS",
    "MeshConfig",
    "Vote",
    "batch_sharding",
    "constrain",
    "features",
    "gathered",
    "held",
    "jit",
    "leaf_sharding",
    "logits_axes",
    "make_mesh",
    "mesh_of",
    "on",
    "on_any_host",
    "on_host",
    "put_batch",
    "replicated",
    "row_ways",
    "shard",
    "tree_shardings",
    "ways",
]
