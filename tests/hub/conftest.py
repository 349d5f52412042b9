"""Tiny random Llama checkpoints, written by transformers in sizes that nothing divides evenly."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def make_llama() -> Callable:
    """make_llama(seed=0, **config changes) → a transformers LlamaForCausalLM with random norms too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

    def make(seed: int = 0, **changes) -> "transformers.LlamaForCausalLM":
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**(SIZES | changes))
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
                elif name.endswith("bias"):
                    parameter.copy_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def llama_folder(make_llama: Callable, tmp_path: Path) -> Callable:
    """llama_folder(**config changes) → (folder, the transformers model saved there)."""

    def save(name: str = "base", max_shard_size: str = "5GB", **changes) -> tuple:
        model = make_llama(**changes)
        model.save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        return tmp_path / name, model

    return save


@pytest.fixture
def edit_json() -> Callable:
    """edit_json(path, **changes): rewrites keys of a JSON file; a value of None removes the key."""

    def edit(path: Path, **changes) -> None:
        value = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))

    return edit


@pytest.fixture
def llama_cpp():
    """llama_cpp(model file, adapter file or None): the model as llama.cpp opens it, computing in float32."""
    module = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    models = []

    def open_file(path, adapter=None, **settings):
        of_the_file = dict(yarn_attn_factor=-1.0, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0)
        models.append(
            module.Llama(
                str(path),
                lora_path=None if adapter is None else str(adapter),
                verbose=False,
                **dict(type_k=0, type_v=0, logits_all=True) | of_the_file | settings,
            )
        )
        return models[-1]

    yield open_file
    for model in models:
        model.close()
