"""The strictest JAX for every test: eight CPU devices, no implicit rank promotion."""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# Eight devices share XLA's threads, by default one each, and a device may wait in two collectives at once: on few
# cores all threads then wait for a device that has none. The timeout is for a machine that is busy with other work.
os.environ["NPROC"] = "64"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=300"
    # LLVM would take half of the time to optimise programs that run once. XLA's own passes, which decide what is
    # computed, all run.
    + " --xla_backend_optimization_level=0"
    # In 32 parts, for as many threads, a program takes a fifth more of the time of the few cores there are.
    + " --xla_cpu_parallel_codegen_split_count=1"
)
# MLIR's lowering of fusions takes half of what is left, where XLA's older emitters write LLVM's code themselves. jaxlib
# 0.12 has them no more, and XLA ends a process that gives it a flag it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# torch's threads wait for each other by spinning: on cores that other processes want too, the small models of the tests
# take thirty times as long with two threads as with one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
import tokenizers
import torch
import transformers

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody reads where an operation of a program was written
jax.devices()  # all eight, before a test of `jlora plan` asks for fewer
# What one test has compiled, no other test of the process compiles again. Processes share no folder: it has no lock.
CACHE = tempfile.mkdtemp(prefix="jlora-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled_is_kept():
    """Each program takes memory and several of the 65,530 mappings that Linux gives a process: a run needs more."""
    yield
    jax.clear_caches()


# The files that take longest. A process takes the next file when it is done with one: were they the last, the other
# processes would wait for them.
LONGEST = ("test_main_job.py", "test_alignment.py", "models/test_families.py", "gguf/test_families.py")


def pytest_collection_modifyitems(items):
    # A twentieth of the time went to looking for garbage among the millions of objects of modules, which stay, and of
    # tracing, which are gone by themselves.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


PARITY = "parity"
COLUMNS = ("logits", "cache", "padding", "packing", "loss", "LoRA gradients", "export", "in", "out", "updates")


@pytest.fixture
def parity(record_property):
    """parity(table, row, column, difference) notes a largest relative difference for `--parity-table`."""

    def note(table, row, column, difference):
        record_property(PARITY, [table, row, column, float(difference)])

    return note


def pytest_addoption(parser):
    parser.addoption("--parity-table", metavar="FILE", help="write the differences that parity tests saw as Markdown")


def pytest_terminal_summary(terminalreporter, config):
    if not (path := config.getoption("--parity-table")):
        return
    tables = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == PARITY and report.when == "call":
                table, row, column, difference = value
                cells = tables.setdefault(table, {}).setdefault(row, {})
                cells[column] = max(difference, cells.get(column, 0.0))
    pathlib.Path(path).write_text("\n".join(markdown(title, rows) for title, rows in sorted(tables.items())))


def markdown(title, rows):
    """A table of the largest differences: 3e-07, or "equal" where there was none."""

    def cell(value):
        return "" if value is None else f"{value:.0e}" if value else "equal"

    columns = sorted({column for found in rows.values() for column in found}, key=COLUMNS.index)
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, found in sorted(rows.items()):
        cells = [
            "" if column not in found else f"{found[column]:.0e}" if found[column] else "equal" for column in columns
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer of 256 bytes and one stop token, with a chat template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<|end|>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory, byte_tokenizer):
    """make_llama(**sizes): the folder of a Llama of two layers with random weights, the same for the same sizes."""

    def make(**sizes):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            num_hidden_layers=2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            **{"vocab_size": 257} | sizes,
        )
        folder = tmp_path_factory.mktemp("model")
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        byte_tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def model_folder(make_llama):
    return make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)
