"""Which sites a LoraConfig adapts, with what rank and scale, by PEFT's matching rules for the Hub's dotted names."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from jlora.errors import UserError
from jlora.lora import matching
from jlora.lora.config import LoraConfig
from jlora.lora.sites import InputAxes, Site, sites, with_prefixes


@dataclasses.dataclass(frozen=True)
class Target:
    """One adapted site, with a rank (0: left alone) and a scale for each layer of its stack, or one of each."""

    site: Site
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def rank_array(self) -> np.ndarray:
        """The ranks in the shape of the site's settings."""
        return np.array(self.ranks).reshape(self.site.stack_shape)

    @property
    def scale_array(self) -> jax.Array:
        """The scales, float32, in the shape of the site's settings."""
        return jnp.asarray(np.array(self.scales, np.float32).reshape(self.site.stack_shape))

    def require_linear(self, field: str) -> None:
        """Raises UserError, which names the config's field, unless the site is a linear with a weight of its own."""
        site = self.site
        if site.is_linear:
            return
        what = "a head that is its embedding" if site.tied_to else f"a {site.leaf} of shape {site.shape}"
        raise UserError(f"{field} is for linears; {site.path}: {what} cannot have it")


def find_targets(params: dict, config: LoraConfig, input_axes: InputAxes = ()) -> list[Target]:
    """The modules of `params` that `config` adapts.

    Args:
        input_axes: see `split_axes`.

    Raises:
        ValueError: a target, an exclusion or a pattern matches nothing (all such are listed, with the names there are),
            or several weights of one module are selected.
    """
    found = sites(params, input_axes)
    _require_matches(config, found)
    targets = []
    for site in found:
        settings = [_settings(name, site, config) for name in site.names]
        if any(rank for rank, _ in settings):
            ranks, scales = zip(*settings, strict=True)
            targets.append(Target(site, ranks, scales))
    paths = [target.path for target in targets]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise UserError(
            "an adapter lies beside one weight of a module, and these modules hold several (kernel, embedding, "
            f"router): exclude_modules can leave them out: {', '.join(twice)}"
        )
    if not targets:
        linears = sorted(site.path for site in found if site.leaf == "kernel")
        raise UserError(f"target_modules={config.target_modules!r} selects no linear; there are {', '.join(linears)}")
    return targets


def _settings(name: str, site: Site, config: LoraConfig) -> tuple[int, float]:
    """(rank, scale) of one layer's module; rank 0 if it is not adapted."""
    names = with_prefixes(name)
    if site.is_parameter:
        wanted = bool(config.target_parameters) and matching.matches(names, config.target_parameters)
    else:
        wanted = matching.targets(config, names, linear=site.leaf == "kernel")
    return (matching.rank_of(config, names), matching.scale_of(config, names)) if wanted else (0, 0.0)


def _require_matches(config: LoraConfig, found: list[Site]) -> None:
    modules = [name for site in found if not site.is_parameter for name in site.names]
    parameters = [name for site in found if site.is_parameter for name in site.names]
    problems = []
    for field, names in (("target_modules", modules), ("exclude_modules", modules), ("target_parameters", parameters)):
        pattern = getattr(config, field)
        if pattern is None or pattern == "all-linear":
            continue
        items = [pattern] if isinstance(pattern, str) else [(item,) for item in pattern]
        problems += [
            f"{field} {item!r}"
            for item in items
            if not any(matching.matches(with_prefixes(name), item) for name in names)
        ]
    for field in ("rank_pattern", "alpha_pattern"):
        keys = [key for key, _ in getattr(config, field)]
        everything = modules + parameters
        problems += [
            f"{field} {key!r}"
            for key in keys
            if not any(matching.matches_key(with_prefixes(name), key) for name in everything)
        ]
    layers = {int(layer[1]) for name in modules if (layer := re.search(r"\.(\d+)\.", name))}
    problems += [f"layers_to_transform {layer}" for layer in config.layers_to_transform or () if layer not in layers]
    if problems:
        last = sorted({name.rpartition(".")[2] for name in modules} | {".".join(n.split(".")[-2:]) for n in parameters})
        raise UserError(
            "these match no linear of the model:\n  "
            + "\n  ".join(problems)
            + f"\nthe model's linears end in: {', '.join(last)}"
        )
