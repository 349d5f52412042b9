"""OpenAI's own client and bodies as bad as they come, against a server in a thread."""

import concurrent.futures
import json
import logging
import shutil
import socket
import time

import httpx
import openai
import pytest

import jlora
from jlora.serve import Engine, Limits, app, server
from jlora.serve.folder import Folder, bank, opened, subfolders

KEY, BASE, NEW, CLIENTS = "a key", "tiny", 8, 64
NAMES = [f"adapter-{number:02}" for number in range(16)]
TEXTS = ["Hello!", "What is it?", "The quick brown fox jumps over the lazy dog.", "x"]


@pytest.fixture(scope="module")
def folder(loaded, make_adapter, tmp_path_factory):
    """A folder of sixteen adapters, and one that no bank holds."""
    path = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        jlora.save_adapter(path / name, make_adapter(seed))
    jlora.save_adapter(path / "dora", make_adapter(0, use_dora=True))
    (path / "no adapter").mkdir()
    return path


@pytest.fixture(scope="module")
def service(loaded, folder):
    model, params, tokenizer = loaded
    notes = []
    adapters = opened(params, folder, "tiny", taken=(BASE,), note=notes.append)
    held = bank(params, adapters, places=18, config=None)
    assert len(notes) == 1 and notes[0].startswith("adapter dora: not added: ")
    engine = Engine(model, held, tokenizer, Limits(rows=8, length=256, queue=CLIENTS, chunk=32))
    engine.start()
    done = subfolders(folder)
    watched = Folder(folder, engine, source="tiny", taken=(BASE,), note=notes.append, done=done)
    yield app.Service(engine, tokenizer, BASE, watched, (KEY, "another", "schlüssel"), body=1 << 16)
    engine.stop(drain=False)


@pytest.fixture(scope="module")
def address(service, serving):
    with serving(app.application(service), service.engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def post(address):
    """post(path, body): (status, the error or the answer)."""

    def post(path, body, key=KEY):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        key = key if isinstance(key, bytes) else key.encode()
        headers = {"Authorization": b"Bearer " + key} if key else {}
        found = httpx.post(f"{address}/v1/{path}", content=content, headers=headers, timeout=120)
        try:
            return found.status_code, found.json().get("error", found.json())
        except ValueError:
            return found.status_code, found.text

    return post


def chat(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def alone(loaded, make_adapter):
    """Adapter → text → the answer of `jlora.generate` with that adapter alone; None is the base."""
    model, params, tokenizer = loaded
    adapted = {None: params} | {name: make_adapter(seed) for seed, name in enumerate(NAMES)}
    asked = [chat(text) for text in TEXTS]
    return {
        name: dict(zip(TEXTS, jlora.generate(model, own, tokenizer, asked, max_new_tokens=NEW), strict=True))
        for name, own in adapted.items()
    }


def ask(client, model, text, **settings):
    settings = dict(temperature=0, max_completion_tokens=NEW) | settings
    return client.chat.completions.create(model=model, messages=chat(text), **settings)


def test_many_clients_over_many_adapters_each_get_the_answer_of_their_adapter_alone(client, alone):
    asked = [(name, TEXTS[(number + turn) % 4]) for turn in range(4) for number, name in enumerate(NAMES)]
    assert len(asked) == CLIENTS
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(lambda pair: ask(client, *pair), asked))
    for (name, text), answer in zip(asked, found, strict=True):
        (choice,) = answer.choices
        assert choice.message.content == alone[name][text], (name, text)
        assert answer.model == name and answer.usage.completion_tokens <= NEW
        assert choice.finish_reason in ("stop", "length")
    assert len({answer.choices[0].message.content for answer in found}) > 40


def test_a_stream_says_the_same(client, alone):
    name, text = NAMES[3], TEXTS[1]
    chunks = list(ask(client, name, text, stream=True, stream_options={"include_usage": True}, n=2, logprobs=True))
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > NEW
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == alone[name][text]
        assert [choice.finish_reason for choice in own if choice.finish_reason] in (["length"], ["stop"])
        assert sum(len(choice.logprobs.content) for choice in own if choice.logprobs) >= NEW - 1
    assert chunks[-1].usage.total_tokens > chunks[-1].usage.completion_tokens >= 2 * (NEW - 1)


def test_completions_take_several_prompts_as_texts_or_tokens(client, loaded):
    model, params, tokenizer = loaded
    texts = ["ab", "xyz"]
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    expected = jlora.generate(model, params, tokenizer, texts, max_new_tokens=NEW)
    settings = dict(model=BASE, temperature=0, max_tokens=NEW)
    for prompt in (texts, tokens):
        found = client.completions.create(prompt=prompt, logprobs=2, **settings)
        assert [choice.text for choice in found.choices] == expected
        assert found.usage.prompt_tokens == 5 and len(found.choices[1].logprobs.token_logprobs) <= NEW
        assert all(len(top) == 2 for top in found.choices[0].logprobs.top_logprobs)
    nearly_full = client.completions.create(model=BASE, prompt="x" * 250, temperature=0)
    assert nearly_full.usage.completion_tokens <= 6  # not 16, which the client did not ask for
    streamed = client.completions.create(prompt="ab", stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected[0]


def test_seeds_stops_and_sampling_are_the_clients(client, loaded):
    def drawn(**settings):
        extra = dict(top_k=50, min_p=0.01, repetition_penalty=1.1)
        settings = dict(temperature=1.0, top_p=0.95, extra_body=extra) | settings
        return [choice.message.content for choice in ask(client, NAMES[0], "Hello!", **settings).choices]

    first, second = drawn(seed=1, n=3), drawn(seed=2)
    assert drawn(seed=1, n=3) == first and len({*first, *second}) == 4
    whole = ask(client, NAMES[1], "x").choices[0].message.content
    cut = ask(client, NAMES[1], "x", stop=[whole[3]]).choices[0]
    assert cut.message.content == whole[: whole.index(whole[3])] and cut.finish_reason == "stop"


def test_models_are_the_base_and_the_adapters(client):
    assert [model.id for model in client.models.list()] == [BASE, *NAMES]
    assert client.models.retrieve(NAMES[0]).id == NAMES[0]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../etc")


@pytest.mark.parametrize(
    ("status", "change", "told"),
    [
        (400, b"{", "the body is not JSON"),
        (400, b"[" * 60000, "the body is not JSON"),
        (400, b"[1]", "found a list, expected an object"),
        (400, {"temperature": "hot", "n": 0, "max_tokens": -5}, "max_tokens: found -5, expected a whole number of at"),
        (400, {"temperature": "hot", "n": 0, "max_tokens": -5}, 'temperature: found "hot", expected a number'),
        (400, {"temperature": True}, "temperature: found true, expected a number"),
        (400, {"temperature": -1}, "temperature=-1: expected 0 (greedy) or more"),
        (400, {"top_p": float("nan")}, "top_p: found NaN, expected a number"),
        (400, {"top_p": 1.5, "presence_penalty": 3}, "presence_penalty=3: expected -2 to 2"),
        (400, {"top_logprobs": 3}, "expected logprobs=true with it"),
        (400, {"logprobs": True, "top_logprobs": 21}, "top_logprobs=21: expected 0 to 20"),
        (400, {"messages": "hello"}, 'messages: found "hello", expected a list of messages'),
        (400, {"messages": []}, "messages: found an empty list"),
        (400, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role: found 'wizard'"),
        (400, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        (400, {"messages": [{"role": "user", "content": "\ud800"}]}, "half of a character"),
        (400, {"messages": [{"role": "user", "content": "x" * 300}]}, "tokens, expected fewer than 256"),
        (400, {"max_tokens": 255}, "and max_tokens=255 are more than 256"),
        (400, {"stop": ["a", 1]}, "stop: found a list, expected text"),
        (400, {"chat_template_kwargs": {"chat_template": "x"}}, "found chat_template, which no chat template reads"),
        (400, {"logit_bias": {"5": 1}}, "logit_bias: found {'5': 1}, which is not supported"),
        (400, {"max_token": 5}, "max_token: unknown; the fields are"),
        (400, {"model": None}, "model: missing"),
        (404, {"model": "gpt"}, "the model 'gpt' does not exist"),
        (404, {"model": "../adapters/adapter-00"}, "does not exist"),
        (404, {"model": "\ud800"}, "does not exist"),
        (413, {"messages": [{"role": "user", "content": "x" * 70000}]}, "expected at most 65536"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said_in_openais_form(post, status, change, told):
    body = change if isinstance(change, bytes) else {"model": NAMES[0], "messages": chat("x")} | change
    found, error = post("chat/completions", body)
    assert found == status and told in error["message"], error
    assert error["type"] == "invalid_request_error"
    is_long = "than 256" in told
    assert error["code"] == ("model_not_found" if status == 404 else "context_length_exceeded" if is_long else None)


def test_keys_are_needed_and_paths_known(post, address):
    body = {"model": BASE, "messages": chat("x"), "max_tokens": 1}
    for key in ("", "wrong", "a keyy"):
        status, error = post("chat/completions", body, key=key)
        assert status == 401 and error["code"] == "invalid_api_key"
    for key in ("another", "schlüssel".encode()):
        assert post("chat/completions", body, key=key)[0] == 200
    assert post("edits", body)[0] == 404
    wrong = httpx.get(f"{address}/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["Allow"] == "POST"
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


@pytest.fixture
def connect(address):
    """connect(head): a socket to the server that has sent the head of a request with a key."""
    host, _, port = address.removeprefix("http://").partition(":")
    opened = []

    def connect(head):
        opened.append(socket.create_connection((host, int(port)), timeout=30))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n{head}"
        opened[-1].sendall(head.encode())
        return opened[-1]

    yield connect
    for sock in opened:
        sock.close()


def heard(sock):
    """What the server says until it closes."""
    found = b""
    while part := sock.recv(4096):
        found += part
    return found


def test_a_gigabyte_is_refused_before_it_is_read(connect):
    told, endless = (
        f"Content-Length: {1 << 30}\r\n\r\n{{",
        "Transfer-Encoding: chunked\r\n\r\n" + "8000\r\n" + "x" * 0x8000,
    )
    for body in (told, endless + "\r\n8000\r\n" + "x" * 0x8000 + "\r\n8000\r\nx"):
        found = heard(connect(body))
        assert found.startswith(b"HTTP/1.1 413 ") and b" 65536" in found


def test_a_body_that_does_not_end_is_not_waited_for(connect, monkeypatch):
    monkeypatch.setattr(app, "UPLOAD", 0.2)
    assert heard(connect('Content-Length: 100\r\n\r\n{"mod')).startswith(b"HTTP/1.1 408 ")


def test_connections_that_ask_for_nothing_are_closed(client, connect, monkeypatch):
    monkeypatch.setattr(server, "IDLE", 0.5)
    sock = connect("X-Unfinished:")
    with ask(client, NAMES[0], "x", stream=True, max_completion_tokens=200, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        assert heard(sock) == b""
        for _ in stream:  # one that is being answered is not
            pass


def test_whoever_goes_away_while_sending_leaves_no_trace_in_the_log(connect, post, monkeypatch):
    lines = []
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handle", lines.append)
    for head in ("Content-Length: 100", "Transfer-Encoding: chunked"):
        connect(f"{head}\r\n\r\n").close()
    assert post("completions", {"model": BASE, "prompt": "x", "max_tokens": 1})[0] == 200
    assert not lines


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_whoever_goes_away_frees_a_row(client, service):
    settings = dict(max_completion_tokens=200, extra_body={"ignore_eos": True})
    stream = ask(client, NAMES[0], "x", stream=True, **settings)
    next(iter(stream)), until(lambda: service.engine.load["running"] == 1)
    stream.close()
    until(lambda: service.engine.load["running"] == 0)
    ended = service.engine.numbers["ended_cancelled"]
    assert ended >= 1
    with pytest.raises(openai.APITimeoutError):
        ask(client, NAMES[0], "x", timeout=0.2, max_completion_tokens=220, extra_body={"ignore_eos": True})
    until(lambda: service.engine.load["running"] == 0)


def test_the_queue_has_an_end(client, service, monkeypatch):
    monkeypatch.setattr(service.engine, "limits", Limits(rows=1, queue=0))
    with ask(client, NAMES[0], "x", stream=True, max_completion_tokens=200, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="1 request running or waiting"):
            ask(client, NAMES[0], "x")
        with pytest.raises(openai.BadRequestError, match="found 2 answers to give at once, expected at most 1"):
            ask(client, NAMES[0], "x", n=2)
    until(lambda: service.engine.load["running"] == 0)


def test_adapters_come_and_go_by_the_folder_and_by_request(client, post, service, folder, make_adapter, alone):
    engine, scan = service.engine, service.folder.scan
    shutil.copytree(folder / NAMES[5], folder / "new")
    scan()
    assert "new" not in engine.adapters  # it may still be written
    scan()
    assert ask(client, "new", "x").choices[0].message.content == alone[NAMES[5]]["x"]
    jlora.save_adapter(folder / "new", make_adapter(6))
    scan(), scan()
    assert ask(client, "new", "x").choices[0].message.content == alone[NAMES[6]]["x"]
    jlora.save_adapter(folder / "wide", make_adapter(7, r=40))
    scan(), scan()
    assert "wide" not in engine.adapters and ask(client, "new", "x")
    shutil.rmtree(folder / "new")
    scan()
    assert ask(client, "new", "x")  # it may be being replaced
    scan()
    with pytest.raises(openai.NotFoundError):
        ask(client, "new", "x")
    for path in (NAMES[2], str(folder / NAMES[2])):
        assert post("load_lora_adapter", {"lora_name": "mine", "lora_path": path})[0] == 200
    assert ask(client, "mine", "x").choices[0].message.content == alone[NAMES[2]]["x"]
    for path, told in {
        "../": "leaves the folder",
        "/etc": "leaves the folder",
        "no adapter": "holds no adapter_config.json",
        "wide": "expected at most",
        "dora": "more than a bank holds",
        "\0": "cannot be a path",
        "\ud800": "cannot be a path",
        "x" * 5000: "cannot be a path",
    }.items():
        status, error = post("load_lora_adapter", {"lora_name": "mine", "lora_path": path})
        assert status == 400 and told in error["message"]
    assert post("load_lora_adapter", {"lora_name": BASE, "lora_path": NAMES[2]})[0] == 400
    _, error = post("load_lora_adapter", {"lora_name": "mine", "lora_path": NAMES[2], "load_inplace": True})
    assert "load_inplace: unknown; the fields are lora_name, lora_path" in error["message"]
    for name in ("a/b", "a\nb", "\ud800", "x" * 300):
        assert post("load_lora_adapter", {"lora_name": name, "lora_path": NAMES[2]})[0] == 400
    assert ask(client, "mine", "x").choices[0].message.content == alone[NAMES[2]]["x"]
    assert post("unload_lora_adapter", {"lora_name": "mine"})[0] == 200
    assert post("unload_lora_adapter", {"lora_name": "mine"})[0] == 404
    assert engine.adapters == NAMES


def test_prometheus_reads_the_metrics(client, address, service):
    from prometheus_client.parser import text_string_to_metric_families

    ask(client, BASE, "x")
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
        for sample in family.samples
    }
    assert found["jlora_adapters"] == len(NAMES) and found["jlora_running"] == 0
    assert found["jlora_tokens_drawn_total"] == service.engine.numbers["tokens_drawn"] > 0
    assert found["jlora_request_seconds_count"] > 0 and found["jlora_refused_total"] > 0
