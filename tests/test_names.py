"""What commands offer as choices is what the tables hold."""

from jlora import hub, names, quant
from jlora.hub.checkpoints.methods import BY_FORMAT
from jlora.lora.mixing import METHODS
from jlora.train.config import OWN
from jlora.train.planning import topology


def test_names_are_the_keys_of_their_tables():
    assert tuple(quant.FORMATS) == names.PACKED_FORMATS
    assert tuple(BY_FORMAT) == names.WRITTEN_FORMATS
    assert tuple(hub.GGUF_TYPES) == names.GGUF_TYPES
    assert tuple(METHODS) == names.MIXTURES
    assert names.OWN_SETTINGS == OWN
    assert tuple(extra for _, extra in topology.COMPILERS.values() if extra) == names.COMPILERS
