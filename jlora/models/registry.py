"""config.json → model."""

import json
from typing import Any

from jlora.errors import UserError
from jlora.families import FAMILIES
from jlora.families.fields import Fields
from jlora.models.config import ModelConfig
from jlora.models.layers import ACTIVATIONS, LEARNED
from jlora.models.model import Model


def build(hf_config: dict[str, Any]) -> Model:
    """The model that a parsed config.json describes.

    Raises:
        ValueError: the model_type is unknown, fields are missing or contradict each other, or values that change the
            computation are not supported; all faults are listed.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type {model_type!r} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    fields = Fields(hf_config)
    family = FAMILIES[model_type]
    values = family.read(fields)
    activations = (*ACTIVATIONS, *(LEARNED if family.names.activation else ()))
    if values["hidden_act"] not in activations:
        fields.text.problems.append(
            f"hidden_act {values['hidden_act']!r} is not supported (supported: {', '.join(activations)})"
        )
    ends = fields.get("eos_token_id", fields.text.get("eos_token_id", ()))
    fields.finish()
    return Model(
        ModelConfig(
            **values,
            model_type=model_type,
            names=family.names,
            eos_token_ids=(ends,) if isinstance(ends, int) else tuple(ends),
            source=json.dumps(hf_config, sort_keys=True),
        )
    )
