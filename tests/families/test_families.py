"""What the table of families promises to everything that follows from it."""

import dataclasses
import functools
import pathlib
import re

import numpy as np
import pytest
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from jlora import families, models, tree
from jlora.families import FAMILIES, Family, called, each
from jlora.families.family import Delta, Latent
from jlora.families.fields import Fields
from jlora.families.layouts import Sizes
from jlora.hub.checkpoints import names as hub_names
from jlora.hub.gguf.config import read_config
from jlora.hub.gguf.metadata import check, describe
from jlora.lora.sites import TIED_HEADS
from jlora.models import ModelConfig

EVERY = pytest.mark.parametrize("model_type", FAMILIES)
IN_GGUF = pytest.mark.parametrize("model_type", [kind for kind, family in FAMILIES.items() if family.gguf])
SIZES = Sizes(
    queries=6,
    keys=2,
    delta=Delta(2, 6, key_dim=6, value_dim=8, conv_kernel=3),
    latent=Latent(None, 5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3),
)


@functools.cache
def model_of(model_type):
    """A model with the settings that the family has if config.json says nothing, except for what GGUF cannot say."""
    return models.build(transformers.CONFIG_MAPPING[model_type]().to_dict() | {"norm_topk_prob": True})


# Shapes that a tensor can have on the Hub, for these sizes.
JOINED_SHAPES = {
    "experts": (6, 12, 6),
    "in_proj_qkvz": (120, 4),
    "A_log": (6,),
    "dt_bias": (6,),
    "conv1d": (72, 1, 3),
    "conv.conv": (6, 1, 3),
    "kv_b": (42, 5),
}


def joined_shape(joined):
    return next((shape for part, shape in JOINED_SHAPES.items() if part in joined.name), (1, 6))


@functools.cache
def leaves_of(model_type):
    return tree.flatten(model_of(model_type).abstract_params())


def tensors_of(model_type):
    """The Hub's tensors of all leaves; of a layer's hundreds of experts, one."""
    return [
        tensor
        for path, leaf in leaves_of(model_type).items()
        for tensor in hub_names.hub_tensors(path, leaf.shape, model_type)
        if ".experts." not in tensor.name or ".experts.1." in tensor.name
    ]


def test_each_lists_a_value_once_in_order():
    assert each(lambda family: family.names.stack) == ("layers", "language_model/layers", "h", "gpt_neox/layers")
    assert called("head") == ("lm_head", "embed_out")
    assert called("positions") == ("wpe",)


@EVERY
def test_a_family_is_found_by_its_own_model_types_and_classes(model_type):
    family = FAMILIES[model_type]
    assert isinstance(family, Family) and model_type in family.model_types
    seeing, text = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    # Of Mistral 4, transformers lists the language model among those that see.
    classes = seeing if family.half or model_type not in text else text
    assert family.class_name == classes[model_type]
    scored = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
    assert scored == (family.score and f"{family.score}ForSequenceClassification")


@EVERY
def test_reading_gives_what_a_model_needs_and_leaves_the_names_to_the_table(model_type):
    fields = Fields(transformers.CONFIG_MAPPING[model_type]().to_dict())
    values = FAMILIES[model_type].read(fields)
    fields.finish()
    given = {*values, "model_type", "names", "eos_token_ids", "source"}
    needed = {field.name for field in dataclasses.fields(ModelConfig) if field.default is dataclasses.MISSING}
    assert needed <= given <= {field.name for field in dataclasses.fields(ModelConfig)}
    assert not {"model_type", "names"} & values.keys()


@pytest.mark.parametrize("model_type", [kind for kind, family in FAMILIES.items() if family.half])
def test_the_families_of_a_text_half_have_all_names_in_common(model_type):
    family = FAMILIES[model_type]
    for text in family.half.families:
        own, alone = text.names.below(family.half.module), text.model_types[0]
        config = model_of(alone if alone in FAMILIES else model_type).config  # Muse Glimmer is never alone
        mixes = any(layer.mixer != "attention" for layer in config.layers)
        used = {"latents": config.latent, "shared_expert": config.experts, "mixers": mixes}
        idle = {part: getattr(own, part) for part, is_used in used.items() if not is_used}
        assert family.names._replace(**idle) == own
        shared = ("prefix", "checkpoint_names", "untransposed", "buffers")
        assert [getattr(family, name) for name in shared] == [getattr(text, name) for name in shared]
    for path, leaf in leaves_of(model_type).items():
        names = [tensor.name for tensor in hub_names.hub_tensors(path, leaf.shape, model_type)]
        assert not any(family.half.is_other(found) for name in names for found in (name, family.half.formerly(name)))


@EVERY
def test_every_leaf_has_its_part_and_its_name(model_type):
    family, leaves = FAMILIES[model_type], leaves_of(model_type)
    modules = {path.rpartition("/")[0] for path in leaves}
    outside = {module for module in modules if tree.stack_of(module) is None}
    assert outside <= {*family.names.outside} <= {*outside, family.names.head}
    assert {tree.stack_of(module).name for module in modules - outside} == {family.names.stack}
    assert TIED_HEADS[family.names.embedding] == family.names.head
    found = [tensor.name for path, leaf in leaves.items() for tensor in hub_names.hub_tensors(path, leaf.shape)]
    assert len(found) == len(set(found))
    assert all(name.startswith((family.prefix, f"{family.names.head}.")) for name in found)


@IN_GGUF
def test_gguf_names_every_tensor_and_back(model_type):
    written = {tensor.name: hub_names.to_gguf(tensor.name, model_type) for tensor in tensors_of(model_type)}
    parts = [part for there in written.values() for part in there.names]
    assert len(parts) == len(set(parts))
    read = hub_names.from_gguf(parts, model_type)
    assert {name.replace("{expert}", "1"): there.names for name, there in read.items()} == {
        name: there.names for name, there in written.items()
    }


@IN_GGUF
@pytest.mark.filterwarnings("ignore:llama.cpp has no window")
def test_gguf_metadata_says_the_same_model_and_back(model_type):
    model = model_of(model_type)
    metadata, divisors = describe(model.config)
    metadata |= {"general.architecture": FAMILIES[model_type].gguf.architecture}
    shapes = {
        part: tensor.shape
        for tensor in tensors_of(model_type)
        for part in hub_names.to_gguf(tensor.name, model_type).names
    }
    shapes |= {name: array.shape for name, array in divisors.items()}
    check(model.config, metadata, shapes, divisors.__getitem__)
    found = read_config(pathlib.Path("a file"), metadata, shapes, divisors.__getitem__)
    assert FAMILIES[found["model_type"]].gguf.architecture == FAMILIES[model_type].gguf.architecture
    assert found["architectures"] == [FAMILIES[found["model_type"]].class_name]


@IN_GGUF
def test_layouts_are_undone(model_type):
    values = np.arange(6 * 4 * 3 * 6.0).reshape(-1, 6)
    for pattern, layout in FAMILIES[model_type].gguf.layouts:
        written = layout.to_gguf(values, SIZES)
        np.testing.assert_array_equal(layout.from_gguf(written, SIZES), values, err_msg=pattern)
        assert written.shape != values.shape or np.any(written != values)
    for joined in FAMILIES[model_type].gguf.joined:
        values = np.random.default_rng(0).normal(size=joined_shape(joined))
        parts = joined.taken(values, SIZES)
        assert len(parts) == len(joined.parts)
        np.testing.assert_allclose(joined.made(parts, SIZES), values, rtol=1e-12, err_msg=joined.name)


@functools.cache
def texts():
    """path → the text of every file, without GGUF's architectures, which have the names of other model types."""
    package = pathlib.Path(families.__file__).parent.parent
    return {
        path.relative_to(package).as_posix(): re.sub(r'Gguf\(\s*"[^"]+"', "Gguf(", path.read_text())
        for path in package.rglob("*.py")
    }


@EVERY
def test_only_its_own_file_spells_a_model_type(model_type):
    found = {path for path, text in texts().items() if f'"{model_type}"' in text}
    # The kinds of tokenizers that llama.cpp knows have the names of models too, and most GGUF files are Llamas.
    found -= {"hub/gguf/tokenizer.py", "hub/tokenizer.py", "hub/checkpoints/names.py"}
    assert len(found) == 1
