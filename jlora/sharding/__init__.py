"""Device meshes, and the rules that place every leaf of a param tree on them."""

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
from jlora.sharding.rules import leaf_sharding, shard, tree_shardings

__all__ = [
    "MeshConfig",
    "Vote",
    "batch_sharding",
    "leaf_sharding",
    "make_mesh",
    "on_any_host",
    "on_host",
    "put_batch",
    "replicated",
    "row_ways",
    "shard",
    "tree_shardings",
]
