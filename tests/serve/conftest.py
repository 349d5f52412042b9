"""A tiny Llama with adapters that change its answers, and what `jlora.generate` answers with each alone."""

import contextlib
import functools
import threading

import jax
import pytest

import jlora
from jlora import lora
from jlora.lora import Bank
from jlora.serve import server

NAMES = ("shop", "law", "verse")
NEW = 12


@pytest.fixture(scope="session")
def loaded(model_folder):
    """(model, params, tokenizer)."""
    return *jlora.load(model_folder, dtype="float32"), jlora.load_tokenizer(model_folder)


@pytest.fixture(scope="session")
def make_adapter(loaded):
    """make_adapter(seed, **config): params with an adapter that does something."""

    def make(seed, **config):
        config = dict(r=2, lora_alpha=200, target_modules="all-linear") | config
        config = jlora.LoraConfig(**config, init_lora_weights=False)
        return lora.init(loaded[1], config, jax.random.key(seed))

    return make


@pytest.fixture(scope="session")
def adapters(make_adapter):
    return {name: make_adapter(seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="session")
def make_bank(loaded, adapters):
    """make_bank(places): a bank of all adapters of its own, for an engine takes it over."""
    return lambda places=4: Bank.of(loaded[1], adapters, places=places, config=jlora.LoraConfig(r=4))


@pytest.fixture(scope="session")
def alone(loaded, adapters):
    """alone(prompt, adapter, **settings): the NEW tokens that `jlora.generate` answers with."""
    model, params, tokenizer = loaded

    @functools.cache
    def answer(prompt, adapter=None, **settings):
        adapted = adapters[adapter] if isinstance(adapter, str) else params
        return jlora.generate(model, adapted, tokenizer, prompt, max_new_tokens=NEW, **settings)[0]

    return answer


@pytest.fixture(scope="session")
def serving():
    """serving(application, engine): a context with its address, where a thread serves it."""

    @contextlib.contextmanager
    def serving(application, engine):
        at = server.listen("127.0.0.1", 0)
        running = server.Server(server.uvicorn.Config(application, log_level="warning", lifespan="off"), engine)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [at]})
        thread.start()
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
        running.should_exit = True
        thread.join()

    return serving
