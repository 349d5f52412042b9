"""Whatever else is in the batch, a request is answered as `jlora.generate` would answer it alone."""

import threading

import jax
import numpy as np
import pytest
import transformers

from jlora.generate import rollout
from jlora.models import build
from jlora.serve import Busy, Engine, Limits, Request, Sampling, Stopping

GREEDY = Sampling(temperature=0.0)
LONG = "The quick brown fox jumps over the lazy dog. " * 6
ASKED = [("a", "law"), ("What is it?", "shop"), (LONG, "verse"), ("What is it?", "law"), (LONG + "!", "verse")]
NEW = 12


class Heard:
    """What a listener was told."""

    def __init__(self):
        self.pieces, self.ended = [], threading.Event()

    def __call__(self, piece):
        self.pieces.append(piece)
        if piece.finish:
            self.ended.set()

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)

    @property
    def end(self):
        return self.pieces[-1]

    @property
    def tokens(self):
        return [token for piece in self.pieces for token in piece.tokens]


@pytest.fixture(scope="module")
def engine(loaded, make_bank):
    """One for all tests: each leaves it idle, with the adapters that it found."""
    model, _, tokenizer = loaded
    made = Engine(model, make_bank(places=5), tokenizer, Limits(rows=4, length=512, queue=3, chunk=32))
    made.programs.warm()
    return made


@pytest.fixture(scope="module")
def ask(loaded, engine):
    """ask(prompt, adapter, **request): (what is heard, the job)."""

    def ask(prompt, adapter=None, new=NEW, sampling=GREEDY, **more):
        heard = Heard()
        tokens = loaded[2](prompt)["input_ids"]
        return heard, engine.submit(Request(tokens, new, adapter, sampling, **more), heard)

    return ask


def run(engine, turns=2000):
    """Lets the engine work until nothing is left to do, or for some turns."""
    for _ in range(turns):
        if not engine.turn():
            return
    assert turns < 2000


def forget(engine):
    """Makes all rows forget what they have read."""
    for slot in engine._slots:
        slot.held, slot.fed = [], 0


def test_answers_of_a_mixed_batch_are_those_alone(engine, ask, alone):
    """More requests than rows, of all adapters, with prompts of one piece and of several."""
    asked = [(prompt, adapter, *ask(prompt, adapter)) for prompt, adapter in ASKED]
    base, _ = ask("a")
    run(engine)
    for prompt, adapter, heard, _ in asked:
        assert heard.text == alone(prompt, adapter), (prompt, adapter)
        assert heard.end.finish in ("stop", "length") and heard.end.usage.prompt == len(prompt)
    assert len({base.text, *(heard.text for _, _, heard, _ in asked)}) >= len(ASKED)


def test_what_is_drawn_depends_on_the_seed_and_not_on_neighbours(engine, ask, alone):
    settings = dict(temperature=0.8, top_k=40, top_p=0.9)
    found = [
        ask("a", "law", sampling=Sampling(**settings), seed=7)[0],
        *(ask("a", "law", sampling=Sampling(temperature=2.0, min_p=0.01), seed=seed)[0] for seed in (8, 9, 10)),
        ask("a", "law", sampling=Sampling(**settings), seed=7, choice=1)[0],
        ask("a", "law", sampling=Sampling(**settings), seed=7)[0],
    ]
    run(engine)
    assert found[0].text == found[-1].text == alone("a", "law", seed=7, **settings)
    assert len({heard.text for heard in found}) == 5


def test_a_shared_prefix_is_read_once(engine, ask, alone):
    forget(engine)
    read = engine.numbers["prompt_tokens_read"]
    first = [ask(LONG + end, "verse")[0] for end in ("", "?", "!")]
    other, _ = ask(LONG + "!", "law")
    run(engine)
    assert engine.numbers["prompt_tokens_read"] - read < 2 * len(LONG) + 2 * 16 and other.end.usage.cached == 0
    assert sorted(heard.end.usage.cached > len(LONG) - 20 for heard in first) == [False, True, True]
    assert first[2].text == alone(LONG + "!", "verse")
    read = engine.numbers["prompt_tokens_read"]
    again, _ = ask(LONG + "!", "verse")  # what rows hold after their answers is of use too
    run(engine)
    assert engine.numbers["prompt_tokens_read"] == read and again.text == first[2].text
    assert again.end.usage.cached == len(LONG)


def test_a_long_prompt_does_not_hold_the_others_up(engine, ask):
    forget(engine)
    heard, _ = ask("a", new=40)
    run(engine, turns=4)
    long, _ = ask(LONG, "verse")
    short, _ = ask("b", "law")
    before = len(heard.tokens)
    while not long.pieces:
        engine.turn()
    assert len(heard.tokens) > before + 4 and len(short.tokens) > 4
    run(engine)


def test_a_cancelled_request_frees_its_row(engine, ask, alone):
    running = [ask("a", "verse", new=400, ignore_end=True) for _ in range(4)]
    second, _ = ask("a", "law")
    third, waiting = ask("a", "law")
    run(engine, turns=12)
    assert engine.load["running"] == 4 and engine.load["waiting"] == 2 and not second.pieces
    for job in (running[0][1], waiting, running[0][1]):
        engine.cancel(job)
    run(engine, turns=40)
    assert running[0][0].end.finish == third.end.finish == "cancelled" and second.text == alone("a", "law")
    for _, job in running:
        engine.cancel(job)
    run(engine)
    assert all(len(heard.tokens) < 100 for heard, _ in running)
    assert {name: engine.load[name] for name in ("running", "waiting")} == {"running": 0, "waiting": 0}


def test_adapters_come_and_go_and_nothing_is_compiled(engine, ask, alone, make_adapter, adapters):
    old, _ = ask("a", "law")
    run(engine)
    engine.shelf.warm()
    programs, other = len(engine.programs), make_adapter(5, r=3, target_modules=["q_proj"])
    before, _ = ask("a", "law")
    run(engine, turns=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax._src.compiler.compile_or_get_cached", None)  # whoever compiles fails
        with pytest.raises(TypeError):
            jax.jit(lambda x: x + 2)(1)
        replaced, added = engine.put_adapter("law", adapters["shop"]), engine.put_adapter("new", other)
        engine.turn()
        after, new = ask("a", "law")[0], ask("a", "new")[0]
        removed = engine.remove_adapter("shop")
        run(engine)
    assert not any(done.exception() for done in (replaced, added, removed))
    assert before.text == old.text == alone("a", "law") and after.text == alone("a", "shop") != new.text
    assert engine.adapters == ["law", "verse", "new"] and len(engine.programs) == programs
    with pytest.raises(KeyError, match="no adapter is called 'shop'; there are law, verse, new"):
        ask("a", "shop")
    for name in ("law", "shop"):
        engine.put_adapter(name, adapters[name])
    engine.remove_adapter("new")
    run(engine)


def test_what_does_not_fit_leaves_everything_as_it_was(engine, ask, alone, make_adapter):
    wide, dora = (
        engine.put_adapter("law", make_adapter(5, r=9)),
        engine.put_adapter("law", make_adapter(5, use_dora=True)),
    )
    more = [engine.put_adapter(name, make_adapter(6)) for name in ("fourth", "fifth", "sixth")]
    run(engine)
    assert "adapter 'law' does not fit" in str(wide.exception()) and "expected at most" in str(wide.exception())
    assert "more than a bank holds" in str(dora.exception())
    assert more[1].exception() is None
    assert str(more[2].exception()) == "5 places, none of them free: remove one first"
    heard, _ = ask("a", "law")
    removed, *_ = [engine.remove_adapter(name) for name in ("sixth", "fifth", "fourth")]
    run(engine)
    assert heard.text == alone("a", "law") and "no adapter is called 'sixth'" in str(removed.exception())


def test_texts_end_before_their_stop_strings_and_at_stop_tokens(engine, ask, alone):
    text = alone("a", "law")
    whole, _ = ask("a", "law", top=2)
    run(engine)
    numbers = [token.number for token in whole.tokens]
    cut, _ = ask("a", "law", stop=("never", text[2:4]))
    ended, _ = ask("a", "law", stop_ids=(numbers[3],))
    run(engine)
    assert cut.text == text[: text.index(text[2:4])] and cut.end.finish == "stop"
    assert [token.number for token in ended.tokens] == numbers[: numbers.index(numbers[3])]
    assert ended.end.finish == "stop" and ended.end.usage.completion == numbers.index(numbers[3]) + 1


def test_log_probabilities_are_those_of_the_forward_pass(engine, ask, loaded, adapters):
    heard, _ = ask("a", "law", top=3, sampling=Sampling(temperature=0.0, frequency_penalty=2.0))
    ask("b", "shop", sampling=Sampling(temperature=1.5), seed=3)
    run(engine)
    numbers = [token.number for token in heard.tokens]
    row = np.array([[*loaded[2]("a")["input_ids"], *numbers]], np.int32)
    expected = np.asarray(jax.nn.log_softmax(loaded[0](adapters["law"], row)[0], axis=-1))[: len(numbers)]
    found = [token.log_prob for token in heard.tokens]
    np.testing.assert_allclose(found, expected[np.arange(len(numbers)), numbers], atol=1e-4)
    for token, wanted in zip(heard.tokens, expected, strict=True):
        likeliest = np.argsort(-wanted)[:3]
        assert [number for number, _ in token.top] == likeliest.tolist()
        np.testing.assert_allclose([value for _, value in token.top], wanted[likeliest], atol=1e-4)


def test_penalties_are_those_of_the_definition(engine, ask, loaded):
    """On the base, which repeats itself, step by step from the logits."""
    settings = Sampling(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25)
    heard, _ = ask("ab", sampling=settings)
    plain, _ = ask("ab")
    run(engine)
    prompt, drawn = loaded[2]("ab")["input_ids"], []
    for token in heard.tokens:
        row = np.zeros((1, 2 + NEW), np.int32)
        row[0, : 2 + len(drawn)] = [*prompt, *drawn]
        logits = np.asarray(loaded[0](loaded[1], row)[0, 1 + len(drawn)], np.float64)
        counts = np.bincount(drawn, minlength=len(logits))
        seen = (counts > 0) | np.isin(np.arange(len(logits)), prompt)
        logits = np.where(seen, np.where(logits > 0, logits / 1.3, logits * 1.3), logits)
        drawn.append(int(np.argmax(logits - 0.5 * (counts > 0) - 0.25 * counts)))
        assert token.number == drawn[-1]
    assert heard.text != plain.text


def test_the_cache_grows_and_shrinks_with_what_is_in_it(engine, ask, alone):
    forget(engine)
    heard = [ask("a", "law")[0], ask(LONG, "verse")[0]]
    run(engine)
    grown = engine.load["cache_tokens"]
    long, _ = ask("a", "shop", new=90)
    run(engine)
    assert (grown, engine.load["cache_tokens"]) == (512, 128) and long.end.usage.completion == 90
    assert [one.text for one in heard] == [alone("a", "law"), alone(LONG, "verse")]


def test_what_cannot_be_answered_is_said_at_once(engine, ask):
    with pytest.raises(ValueError) as error:
        ask("", new=0, sampling=Sampling(-1.0, top_p=2.0, min_p=-1.0, repetition_penalty=0.0), stop=("",), top=99)
    for text in (
        "max_new_tokens=0: expected 1 or more",
        "temperature=-1.0: expected 0 (greedy) or more",
        "top_p=2.0: expected a probability",
        "min_p=-1.0: expected 0 (off) to 1",
        "repetition_penalty=0.0: expected more than 0",
        "the prompt is empty",
        "top_logprobs=99: expected 0 to 20",
        "stop: found an empty text",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="the prompt has 512 tokens, expected fewer than 512"):
        ask("x" * 512)
    with pytest.raises(ValueError, match="the prompt's 500 tokens and max_tokens=13 are more than 512"):
        ask("x" * 500, new=13)
    jobs = [ask("a", "law")[1] for _ in range(7)]
    with pytest.raises(Busy, match="7 requests running or waiting"):
        ask("a", "law")
    for job in jobs:
        engine.cancel(job)
    run(engine)


def test_those_who_wait_hear_of_a_device_that_fails(engine, ask, alone, monkeypatch):
    heard = [ask("a", "law")[0] for _ in range(6)]
    run(engine, turns=6)
    with monkeypatch.context() as patch:
        patch.setattr(engine.programs, "step", lambda size: 1 / 0)
        engine.turn()
    run(engine)
    assert [one.end.finish for one in heard] == ["error"] * 4 + ["length"] * 2
    assert "ZeroDivisionError" in heard[0].end.error and heard[5].text == alone("a", "law")


def test_nobody_waits_for_an_engine_that_has_failed(loaded, monkeypatch):
    model, params, tokenizer = loaded
    notes, calls, late = [], [], Heard()
    engine = Engine(model, params, tokenizer, Limits(rows=1, length=64, chunk=32), note=notes.append)

    def fail(size):
        calls.append(size)
        if len(calls) == 3:  # the engine gives up before it hears of this one
            engine.submit(Request([1], 4), late)
        raise RuntimeError("no device")

    monkeypatch.setattr(engine.programs, "step", fail)
    monkeypatch.setattr(engine.programs, "warm", lambda *_, **__: None)
    heard = [Heard() for _ in range(4)]
    for one in heard:
        engine.submit(Request([1], 4), one)
    engine.start()
    for one in (*heard, late):
        assert one.ended.wait(60) and one.end.finish == "error" and one.end.error == "RuntimeError: no device"
    engine.stop()
    assert isinstance(engine.failure, RuntimeError) and engine.load["running"] == engine.load["waiting"] == 0
    assert len(notes) == 3 and "no device" in notes[0]
    with pytest.raises(Stopping):
        engine.put_adapter("law", params)


def test_programs_that_are_not_needed_yet_wait_for_a_pause(loaded, monkeypatch):
    engine = Engine(*loaded, Limits(rows=1, length=64, chunk=32))
    pauses, heard = [], Heard()
    monkeypatch.setattr("jlora.serve.engine.REST", 0.3)
    monkeypatch.setattr("jlora.serve.engine.time.sleep", pauses.append)
    engine._rest()
    assert not pauses  # nothing is asked
    engine.submit(Request([1], 4), heard)
    engine._rest()
    assert pauses  # but not for ever
    engine.close()
    pauses.clear()
    engine._rest()
    assert not pauses


def test_a_state_is_as_if_read_at_once(loaded):
    """Layers whose state cannot be cut short: in pieces, between others' steps, and on from where an answer ended."""
    sizes = dict(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)
    config = transformers.Lfm2Config(
        **sizes, vocab_size=257, num_hidden_layers=2, layer_types=["conv", "full_attention"], eos_token_id=0
    )
    model = build(config.to_dict())
    params = jax.jit(model.random_params)(jax.random.key(1))
    engine, generator = Engine(model, params, loaded[2], Limits(rows=2, length=64, chunk=8)), np.random.default_rng(0)
    prompts = [generator.integers(1, 257, size).tolist() for size in (5, 21, 1, 14)]
    heard = [Heard() for _ in prompts]
    for prompt, one in zip(prompts, heard, strict=True):
        engine.submit(Request(prompt, 6, None, GREEDY, ignore_end=True), one)
    run(engine)
    found = [[token.number for token in one.tokens] for one in heard]
    prompts.append([*prompts[3], *found[3], 7, 8])
    heard.append(Heard())
    engine.submit(Request(prompts[-1], 6, None, GREEDY, ignore_end=True), heard[-1])
    run(engine)
    found.append([token.number for token in heard[-1].tokens])
    assert heard[-1].end.usage.cached == 14 + 5
    keys = jax.random.split(jax.random.key(0), len(prompts))
    settings = dict(rows=5, max_new_tokens=6, stop_ids=[], temperature=0.0, bucket=32)
    expected = rollout(model, params, prompts, keys, **settings).completions
    assert found == [one.tokens.tolist() for one in expected]


def test_it_runs_in_a_thread_and_answers_what_it_has_before_it_stops(engine, ask, alone):
    engine.start()
    heard = [ask("a", "law")[0] for _ in range(5)]
    engine.stop()
    assert [one.text for one in heard] == [alone("a", "law")] * 5
    with pytest.raises(Stopping):
        ask("a", "law")
