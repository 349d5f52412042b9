"""`jlora chat`, with its input from a pipe and in a terminal."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import jax
import pytest

import jlora
from jlora.cli.main import main


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "law"
    _, params = jlora.load(model_folder, dtype="float32")
    config = jlora.LoraConfig(r=2, init_lora_weights=False, lora_alpha=200)
    jlora.save_adapter(folder, jlora.lora.init(params, config, jax.random.key(0)))
    return folder


@pytest.fixture
def talk(model_folder, monkeypatch, capsys):
    """talk(lines, *options): (what was printed, what was said of it)."""

    def talk(lines, *options):
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        given = [f"--model={model_folder}", "--temperature=0", "--max_new_tokens=6", "--length=256", *options]
        assert main(["chat", *given]) == 0
        found = capsys.readouterr()
        return found.out, found.err

    return talk


def answers(model_folder, *chats, adapter=None):
    model, params = jlora.load(model_folder, dtype="float32")
    params = params if adapter is None else jlora.load_adapter(params, adapter)
    tokenizer = jlora.load_tokenizer(model_folder)
    return jlora.generate(model, params, tokenizer, list(chats), max_new_tokens=6)


def said(*texts, system=None):
    """A conversation in which the user begins."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


def test_a_conversation_is_one_with_its_history_its_system_text_and_its_adapter(talk, model_folder, adapter):
    (first,) = answers(model_folder, said("Hello"), adapter=adapter)
    expected = answers(
        model_folder, said("Hello", first, "two\nlines"), said("Hello"), said("Hello", system="Be brief.")
    )
    lines = ["Hello", "/adapter none", "two\\", "lines", "/reset", "Hello", "/reset", "/system Be brief.", "Hello"]
    out, _ = talk([*lines, "/quit", "never"], f"--adapter={adapter}")
    assert out == "\n".join([first, *expected, ""])


def test_several_devices_say_what_one_says(talk, adapter):
    lines = ["Hello", "/adapter none", "What is it?"]
    (spread, _), (alone, _) = (talk(lines, f"--adapter={adapter}", *more) for more in (["--mesh.tensor=-1"], []))
    assert spread == alone


def test_settings_are_changed_and_mistakes_leave_the_conversation(talk):
    lines = ["/set temperature=1 seed=3", "a", "/reset", "a", "/set seed=4", "/reset", "a"]
    lines += [
        "/undo",
        "/undo",
        "/set temperature=hot heat=1",
        "/set top_p=2",
        "/wizard",
        "/adapter x",
        "/adapter",
        "/help",
        "",
    ]
    out, err = talk([*lines, "x" * 300])
    first, second, third = out.splitlines()
    assert first == second != third
    for told in (
        "temperature=1.0 top_k=0",
        "temperature=hot: expected a number",
        "heat=1: expected NAME=VALUE with one of temperature, top_k",
        "top_p=2.0: expected a probability",
        "taken back: a",
        "nothing has been said that could be taken back",
        "/wizard is not one of /adapter, /system",
        "no adapter is called 'x': there are none",
        "adapters: none; in use: none",
        "/reset             start over",
        "tokens, of 256 that there is room for: /undo takes back what was said last, /reset",
    ):
        assert told in err


def test_an_adapter_that_no_bank_holds_is_used_by_itself(talk, model_folder, tmp_path):
    _, params = jlora.load(model_folder, dtype="float32")
    config = jlora.LoraConfig(r=2, init_lora_weights=False, lora_alpha=200, use_dora=True)
    jlora.save_adapter(tmp_path / "dora", jlora.lora.init(params, config, jax.random.key(0)))
    out, err = talk(["Hello", "/adapter none"], f"--adapter={tmp_path / 'dora'}")
    assert out == answers(model_folder, said("Hello"), adapter=tmp_path / "dora")[0] + "\n"
    assert "no adapter is called 'none': there are dora" in err


def test_a_terminal_streams_an_answer_that_ctrl_c_ends(model_folder):
    main_end, other = pty.openpty()
    command = [sys.executable, "-m", "jlora", "chat", f"--model={model_folder}", "--length=512", "--max_new_tokens=20"]
    environment = os.environ | {"TERM": "dumb"}
    pipes = dict(stdin=other, stdout=other, stderr=other)
    process = subprocess.Popen([*command, "--temperature=0"], **pipes, env=environment, start_new_session=True)
    os.close(other)
    seen, everything = "", ""

    def until(text, seconds=120):
        nonlocal seen, everything
        end = time.monotonic() + seconds
        while not re.search(text, seen):
            assert select.select([main_end], [], [], end - time.monotonic())[0], seen
            seen += os.read(main_end, 4096).decode(errors="replace")
        everything += seen
        found, seen = seen, ""
        return found

    def type_in(text):
        os.write(main_end, text.encode())

    until(r"ready after .* s; /help[^\n]*\n[^\n]*> ")
    type_in("Hello\n")
    shown = until(r"first token after [\d.]+ s[^\n]*; cut off by max_new_tokens[^\n]*\n[^\n]*> ")
    assert "Hello" in shown
    type_in("/set max_new_tokens=300 temperature=1\n")
    until("max_new_tokens=300[^\n]*\n[^\n]*> ")
    type_in("again\n")
    until("again\r\n.+")
    process.send_signal(2)
    until(r"tokens were known[^\n]*\n[^\n]*> ")
    type_in("/quit\n")
    assert process.wait(60) == 0
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", everything)  # nothing that a terminal obeys
    os.close(main_end)
