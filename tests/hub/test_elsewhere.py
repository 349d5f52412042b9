"""What jlora writes opens in older transformers and PEFT, in environments that the tests make for themselves."""

import copy
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile

import jax
import numpy as np
import pytest
import torch
import transformers

from jlora import hub, lora, tree
from jlora.lora import LoraConfig

pytestmark = pytest.mark.slow  # pip installs, then each environment imports PyTorch: minutes

TOKENS = np.array([[1, 5, 9, 100, 7, 3, 2, 11, 40, 8]], np.int32)
ENVIRONMENTS = {
    "4.57": ("transformers==4.57.*", "peft==0.17.*"),
    "4.57 with PEFT 0.18": ("transformers==4.57.*", "peft==0.18.*"),
    "5.0": ("transformers==5.0.*", "peft==0.19.*"),
    "5.9": ("transformers==5.9.*", "peft==0.20.*"),
    "5": ("transformers>=5.20", "peft==0.21.*"),
}
SIZES = dict(
    vocab_size=257,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
GPT_NEOX = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5)
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1], long_factor=[1.5, 3.0])
MODELS = {
    "llama": ("LlamaConfig", SIZES | dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=16))),
    "tied": ("LlamaConfig", SIZES | dict(tie_word_embeddings=True)),
    "mistral": ("MistralConfig", SIZES | dict(head_dim=10, sliding_window=5)),
    "mixtral": ("MixtralConfig", SIZES | dict(num_local_experts=5)),
    "qwen2": ("Qwen2Config", SIZES | dict(use_sliding_window=True, sliding_window=6, max_window_layers=2)),
    "qwen3": ("Qwen3Config", SIZES | dict(head_dim=20)),
    "qwen3_moe": ("Qwen3MoeConfig", SIZES | dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20)),
    "gemma": ("GemmaConfig", SIZES | dict(head_dim=20)),
    "gemma2": ("Gemma2Config", SIZES | dict(head_dim=10, sliding_window=6, query_pre_attn_scalar=12)),
    "gemma3_text": ("Gemma3TextConfig", SIZES | dict(num_hidden_layers=7, head_dim=12, sliding_window=6)),
    "phi3": (
        "Phi3Config",
        SIZES | dict(original_max_position_embeddings=16, rope_parameters=LONG | dict(partial_rotary_factor=0.5)),
    ),
    "smollm3": ("SmolLM3Config", SIZES),
    "olmo2": ("Olmo2Config", SIZES),
    "olmo3": ("Olmo3Config", SIZES | dict(num_hidden_layers=5, sliding_window=6)),
    "granite": ("GraniteConfig", SIZES | dict(embedding_multiplier=12.0, logits_scaling=8.0)),
    "gpt2": ("GPT2Config", dict(vocab_size=257, n_embd=48, n_layer=3, n_head=3, n_positions=64)),
    "gpt_neox": ("GPTNeoXConfig", GPT_NEOX | dict(rotary_pct=0.5)),
}
# Of "tied", whose head is its embedding, or another model.
ADAPTERS = {
    "plain": ("tied", dict(r=4, lora_alpha=12)),
    "dora": ("tied", dict(r=4, lora_alpha=12, use_dora=True)),
    "by module": ("tied", dict(r=4, lora_alpha=12, rank_pattern={"v_proj": 7}, alpha_pattern={"up_proj": 3})),
    "rslora": ("tied", dict(r=4, lora_alpha=12, use_rslora=True)),
    "tied embedding": ("tied", dict(r=4, target_modules=["q_proj", "embed_tokens"], rank_pattern={"embed_tokens": 2})),
    "tokens": ("tied", dict(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 100])),
    "copies": ("llama", dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "head": ("llama", dict(r=4, target_modules=["q_proj", "lm_head", "embed_tokens"])),
    "experts": ("mixtral", dict(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])),
    "gpt2": ("gpt2", dict(r=4)),
}


# Where PEFT does not open an adapter on a mixture's experts, its own either, and what it says: transformers 4 has a
# module for each expert, so that there is no parameter to adapt.
WITHOUT_EXPERTS = {
    **dict.fromkeys(("4.57", "4.57 with PEFT 0.18"), "were set but no parameter was matched"),
    "5.0": "TypeError: WeightRenaming.convert() got an unexpected keyword argument 'loading_info'",
}


@pytest.fixture(scope="session")
def python_of():
    """python_of(name): the interpreter of an environment, made once and kept for later runs."""

    def make(name):
        folder = pathlib.Path(tempfile.gettempdir()) / "jlora-elsewhere" / name.replace(" ", "-")
        python = folder / "bin" / "python"
        if not (folder / "ready").is_file():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            share(folder)
            subprocess.run([str(python), "-m", "pip", "install", "-q", *ENVIRONMENTS[name]], check=True)
            (folder / "ready").touch()
        share(folder)  # the environment that made it may be gone
        return python

    def share(folder):
        """What both have, PyTorch above all, is that of this environment, after what is installed there."""
        [site] = folder.glob("lib/python*/site-packages")
        (site / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")

    return make


@pytest.fixture(scope="module")
def written(tmp_path_factory, byte_tokenizer):
    """{name: (model folder, adapter folder or None, logits)} of everything, written by jlora in bfloat16."""
    root = tmp_path_factory.mktemp("written")
    found = {}
    for name, (kind, fields) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**copy.deepcopy(fields))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / "source")
        model, params = hub.load(root / "source", dtype="bfloat16")
        hub.save_model(root / name, model, params, byte_tokenizer)
        model, params = hub.load(root / name, dtype="float32")
        found[name] = root / name, None, np.asarray(model(params, TOKENS))
    for name, (base, settings) in ADAPTERS.items():
        model, params = hub.load(root / base, dtype="float32")
        params = lora.init(params, LoraConfig(init_lora_weights=False, **settings), jax.random.key(0))
        params = tree.map_with_path(
            lambda path, leaf: leaf + 0.1 if path.rpartition("/")[2].startswith(("trained_", "lora_tokens")) else leaf,
            params,
        )
        for fold in (False, True):
            folder = root / f"{name} {fold}"
            hub.save_adapter(folder, params, base=str(root / base), fold=fold)
            title = f"adapter, {name}{', folded' if fold else ''}"
            found[title] = root / base, folder, np.asarray(model(params, TOKENS))
    return found


def opened_by(python, cases, text, folder):
    """The finished process; folder/NUMBER.npz is what it found of each case that it could open."""
    jobs = [
        {
            "model": str(model),
            "adapter": adapter and str(adapter),
            "tokens": TOKENS.tolist(),
            "text": text,
            "out": str(folder / f"{number}.npz"),
        }
        for number, (model, adapter, _) in enumerate(cases)
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = pathlib.Path(__file__).with_name("elsewhere.py")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), str(script), str(folder / "jobs.json")]
    return subprocess.run(command, capture_output=True, text=True, env=clean)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_models_and_adapters_open(environment, python_of, written, byte_tokenizer, tmp_path):
    cases = {
        name: case
        for name, case in written.items()
        if not (environment in WITHOUT_EXPERTS and name.startswith("adapter, experts"))
    }
    text = "ab, c <|end|>"
    done = opened_by(python_of(environment), cases.values(), text, tmp_path)
    faults = []
    for number, (name, (_, _, expected)) in enumerate(cases.items()):
        if not (tmp_path / f"{number}.npz").is_file():
            faults.append(f"{name}: did not open\n{done.stderr[-2000:]}")
            break
        found = np.load(tmp_path / f"{number}.npz")
        difference = np.abs(found["logits"] - expected).max() / np.abs(expected).max()
        if not difference < 1e-4:
            faults.append(f"{name}: logits differ by {difference:.1e}")
        if found["dtype"] != "torch.bfloat16":
            faults.append(f"{name}: opens in {found['dtype']}")
        if found["ids"].tolist() != byte_tokenizer(text).input_ids or "<|user|>ab<|end|>" not in str(found["chat"]):
            faults.append(f"{name}: another tokenizer or template")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(("environment", "message"), WITHOUT_EXPERTS.items())
def test_where_adapters_on_experts_are_not_tried_peft_says_that_it_cannot(
    environment, message, python_of, written, tmp_path
):
    done = opened_by(python_of(environment), [written["adapter, experts"]], None, tmp_path)
    assert message in done.stderr
