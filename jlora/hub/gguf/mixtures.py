"""The types of a GGUF file's tensors: which matrices llama.cpp's `llama-quantize` gives more bits, as one table.

Nothing here reads or packs values. The rules are those of llama.cpp in 2026; before, a matrix of queries, keys and
values in one had rules of its own.
"""

import re
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

# All but these are in float32: vectors, biases, norms, routers, learned positions, convolutions.
MATRICES = r"(?!position_embd|.*(_norm|ffn_gate_inp|ffn_gate_inp_shexp|ssm_conv1d|shortconv\.conv)\.weight).*\.weight"
UNPACKED = ("per_layer_model_proj.weight",)
EMBEDDINGS, HEAD = ("token_embd.weight", "per_layer_token_embd.weight"), "output.weight"
VALUES, KEYS = r".*attn_(v|qkv|kv_b)\.weight", r".*attn_k\.weight"
DOWN, OUTPUT = r".*ffn_down.*", r".*attn_output\.weight"
PLAIN = ("F32", "F16", "BF16")
# The values of a row that a type packs together, and what llama.cpp takes where a row is not made of such blocks.
BLOCKS = {"Q4_0": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, **{f"Q{bits}_K": 256 for bits in range(2, 7)}}
INSTEAD = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


class Place(NamedTuple):
    """One of several tensors of a kind.

    Attributes:
        index: its number among these; of the MLPs in a mixture of experts, their layer's.
        count: the number of them; of MLPs, the number of layers.
        queries: heads of queries for one of keys and values.
    """

    index: int
    count: int
    queries: int


Rules = tuple[tuple[Callable[[Place], bool], str], ...]


def always(place: Place) -> bool:
    """All of them."""
    return True


def first(number: int) -> Callable[[Place], bool]:
    """The first so many."""
    return lambda place: place.index < number


def first_of(share: int) -> Callable[[Place], bool]:
    """The first eighth, for 8."""
    return lambda place: place.index < place.count // share


def outer_and_third(place: Place) -> bool:
    """The first and the last eighth, and every third between."""
    eighth = place.count // 8
    outer = place.index < eighth or place.index >= 7 * place.count // 8
    return outer or (place.index - eighth) % 3 == 2


def shared(place: Place) -> bool:
    """Four queries or more share a value: it is worth more bits."""
    return place.queries >= 4


class FileType(NamedTuple):
    """What a file of this type holds.

    Attributes:
        number: llama.cpp's, in `general.file_type`.
        type: llama.cpp's name of the type of most matrices.
        values: the rules for attention's values (or queries, keys and values in one): the first that holds counts.
        down, output: those for what the MLP, and attention, put out.
        eight: the type of attention's output in mixtures of eight experts.
    """

    number: int
    type: str
    values: Rules = ()
    down: Rules = ()
    output: Rules = ()
    eight: str | None = None


MORE = ((outer_and_third, "Q6_K"),)
FILE_TYPES = {
    "f32": FileType(0, "F32"),
    "f16": FileType(1, "F16"),
    "bf16": FileType(32, "BF16"),
    "q8_0": FileType(7, "Q8_0"),
    "q6_k": FileType(18, "Q6_K"),
    "q5_k_m": FileType(17, "Q5_K", values=MORE, down=MORE),
    "q5_k_s": FileType(16, "Q5_K"),
    "q5_0": FileType(8, "Q5_0"),
    "q4_k_m": FileType(15, "Q4_K", values=MORE, down=MORE, eight="Q5_K"),
    "q4_k_s": FileType(14, "Q4_K", values=((first(4), "Q5_K"),), down=((first_of(8), "Q5_K"),), eight="Q5_K"),
    "q4_0": FileType(2, "Q4_0"),
    "q3_k_l": FileType(13, "Q3_K", ((always, "Q5_K"),), ((always, "Q5_K"),), ((always, "Q5_K"),)),
    "q3_k_m": FileType(
        12,
        "Q3_K",
        values=((first(2), "Q5_K"), (always, "Q4_K")),
        down=((first_of(16), "Q5_K"), (always, "Q4_K")),
        output=((always, "Q4_K"),),
        eight="Q5_K",
    ),
    "q3_k_s": FileType(11, "Q3_K", eight="Q5_K"),
    "q2_k": FileType(
        10, "Q2_K", ((shared, "Q4_K"), (always, "Q3_K")), ((always, "Q3_K"),), ((always, "Q3_K"),), eight="Q5_K"
    ),
}


def types_of(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any], dtype: str) -> dict[str, str]:
    """Name → llama.cpp's name of the type that the tensor is written in.

    Args:
        shapes: of all of the file's tensors, slowest axis first.
        metadata: the file's, by full key.
        dtype: one of `FILE_TYPES`.
    """
    file = FILE_TYPES[dtype]
    matrices = {name for name, shape in shapes.items() if len(shape) > 1 and re.fullmatch(MATRICES, name)}
    types = {name: file.type if name in matrices else "F32" for name in shapes}
    if file.type in PLAIN:
        return types
    unpacked = dict.fromkeys(matrices & {*UNPACKED}, "F16")
    wanted = _wanted(matrices - {*UNPACKED}, shapes, metadata, file)
    return types | unpacked | {name: _fitting(shapes[name][-1], type) for name, type in wanted.items()}


def _wanted(
    names: Set[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any], file: FileType
) -> dict[str, str]:
    """Name → the type by the table, whether it divides the rows or not."""
    found = dict.fromkeys(names, file.type)
    layers, experts = (_number(metadata, key) for key in ("block_count", "expert_count"))
    heads, groups = (_number(metadata, f"attention.head_count{end}") for end in ("", "_kv"))
    queries = heads // groups if groups else 0
    values, keys, down, output = (
        sorted(filter(re.compile(pattern).fullmatch, names), key=_order) for pattern in (VALUES, KEYS, DOWN, OUTPUT)
    )
    numbers = [_layer(name) if experts > 1 else index for index, name in enumerate(down)]
    for rules, members, indices, count in (
        (file.values, values, range(len(values)), len(values)),
        (file.down, down, numbers, layers),
        (file.output, output, range(len(output)), len(output)),
    ):
        for index, name in zip(indices, members, strict=True):
            place = Place(index, count, queries)
            found[name] = next((type for holds, type in rules if holds(place)), file.type)
    # Models of 70B, in which eight queries share a value: more bits for it cost next to nothing.
    if layers == 80 and heads != groups:
        found |= {name: "Q5_K" for name in values if found[name] in ("Q3_K", "Q4_K")}
    if experts == 8:  # where attention is a small part of the model
        found |= dict.fromkeys((*values, *keys), "Q8_0")
        found |= dict.fromkeys(output, file.eight or file.type)
    for name in {HEAD} if HEAD in names else names & {*EMBEDDINGS}:  # a tied embedding is the head
        whole = shapes[name][-1] % BLOCKS[file.type] == 0
        found[name] = "Q6_K" if whole and file.type != "Q8_0" else "Q8_0"
    return found


def _fitting(columns: int, type: str) -> str:
    """The type, or one that packs fewer values together if a row is not made of its blocks."""
    while columns % BLOCKS.get(type, 1):
        type = INSTEAD.get(type, "F16")
    return type


def _number(metadata: Mapping[str, Any], key: str) -> int:
    """The value, or the first layer's; 0 if there is none."""
    value = metadata.get(f"{metadata['general.architecture']}.{key}", 0)
    return value[0] if isinstance(value, list) else value


def _layer(name: str) -> int:
    """The number of its layer; -1 if it is in none."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def _order(name: str) -> tuple[int, str]:
    return _layer(name), name
