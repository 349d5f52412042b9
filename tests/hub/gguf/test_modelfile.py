"""Modelfiles, read here by the rules of Ollama's own parser, which is written in Go (parser.go, August 2026)."""

import json
import re
import shutil

import pytest

from jlora import hub


def value_is_whole(text):
    quote = next((quote for quote in ('"""', '"') if text.startswith(quote)), "")
    return not quote or (len(text) >= 2 * len(quote) and text.endswith(quote))


def unquoted(text):
    quote = next((quote for quote in ('"""', '"') if text.startswith(quote)), "")
    return text[len(quote) : len(text) - len(quote)]


def read(text):
    """(instruction or parameter, value) of each line: a value ends with its line, unless a quote is open."""
    found, at = [], 0
    while match := re.compile(r"[ \t\r\n]*(?:#[^\r\n]*)?").match(text, at):
        at = match.end()
        if at == len(text):
            return found
        if text[at] in "\r\n#":
            continue
        head = re.compile(r"(?:PARAMETER[ \t]([a-z0-9_]+)|([A-Z]+))[ \t]").match(text, at)
        assert head, f"no instruction: {text[at:][:40]!r}"
        value, at = "", head.end()
        while at < len(text) and not (text[at] in "\r\n" and value_is_whole(value.strip())):
            value += text[at] if text[at].isprintable() or text[at] in "\t\r\n" else ""
            at += 1
        assert value_is_whole(value.strip()), f"a quote is never closed: {value[:40]!r}"
        found.append((head[1] or head[2], unquoted(value.strip())))


@pytest.fixture
def base(tmp_path):
    """base(generation config, file=text…) → a folder that holds no weights."""

    def make(generation=None, **files):
        folder = tmp_path / "base"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return folder

    return make


def test_a_model(base, tmp_path):
    generation = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20.0,
        "top_p": 0.95,
        "min_p": None,
        "repetition_penalty": 1.1,
        "max_new_tokens": 512,
        "max_length": 20,
        "eos_token_id": [1, 2],
        "stop_strings": ["Question:", "<|im_end|>"],
    }
    path = hub.save_modelfile(tmp_path / "out" / "my model.gguf", base(generation), stops=["<|im_end|>", "\n\n", ""])
    assert path == tmp_path / "out" / "Modelfile"
    assert read(path.read_text()) == [
        ("FROM", "./my model.gguf"),
        ("temperature", "0.6"),
        ("top_k", "20"),
        ("top_p", "0.95"),
        ("repeat_penalty", "1.1"),
        ("num_predict", "512"),
        ("stop", "<|im_end|>"),
        ("stop", "\n\n"),
        ("stop", "Question:"),
    ]


def test_greedy_answers(base, tmp_path):
    path = hub.save_modelfile(tmp_path / "m.gguf", base({"do_sample": False, "temperature": 0.6, "top_p": "1"}))
    assert read(path.read_text()) == [("FROM", "./m.gguf"), ("temperature", "0")]


def test_values_that_are_none_are_left_out(base, tmp_path):
    wrong = {"temperature": "hot", "top_k": True, "top_p": [0.9], "min_p": float("nan"), "repetition_penalty": None}
    path = hub.save_modelfile(tmp_path / "m.gguf", base(wrong))
    assert read(path.read_text()) == [("FROM", "./m.gguf")]


@pytest.mark.parametrize(
    "text",
    [
        "You answer in one word.",
        "Two\nlines",
        "  spaces at both ends  ",
        '"quoted"',
        'a "quote" inside',
        'ends in "quotes"',
        'ends in "quotes"\nand goes on with "more"',
        '"',
        '""',
        "\nlines\n\nbetween\n",
        "tab\tand # hash\n# no comment\nFROM elsewhere",
        "Grüße, 你好 🙂",
        'three """ of them, but not at an end',
    ],
)
def test_a_system_text_comes_back_as_it_is(text, base, tmp_path):
    path = hub.save_modelfile(tmp_path / "m.gguf", base(), system=text)
    assert read(path.read_text()) == [("FROM", "./m.gguf"), ("SYSTEM", text)]


@pytest.mark.parametrize(
    ("text", "fault"),
    [('"""\nmore', "three quotes"), ('some """  \nmore', "three quotes"), ("a\u00a0b\u200dc", r"U\+00A0, U\+200D")],
)
def test_a_system_text_that_would_not_is_refused(text, fault, base, tmp_path):
    """And so it is right to refuse it."""
    with pytest.raises(ValueError, match=f"(?s)--system: .*{fault}"):
        hub.save_modelfile(tmp_path / "m.gguf", base(), system=text)
    assert not (tmp_path / "Modelfile").exists()
    try:
        assert read(f'SYSTEM """{text}"""\n') != [("SYSTEM", text)]
    except AssertionError as error:
        assert "no instruction" in str(error) or "never closed" in str(error)


def test_an_adapter_is_put_on_its_base(base, tmp_path):
    folder = base({"temperature": 0.5})
    path = hub.save_modelfile(tmp_path / "out" / "a.gguf", folder, adapter=True)
    assert read(path.read_text()) == [("FROM", str(folder)), ("ADAPTER", "./a.gguf"), ("temperature", "0.5")]
    assert "# Ollama converts this folder" in path.read_text()


def test_a_modelfile_of_ones_own_is_left_alone(base, tmp_path):
    (tmp_path / "Modelfile").write_text("FROM ./mine.gguf\n")
    with pytest.raises(FileExistsError, match="Modelfile is not from jlora"):
        hub.save_modelfile(tmp_path / "m.gguf", base())
    assert (tmp_path / "Modelfile").read_text() == "FROM ./mine.gguf\n"
    hub.save_modelfile(tmp_path / "m.gguf", base(), force=True)
    hub.save_modelfile(tmp_path / "n.gguf", base())
    assert read((tmp_path / "Modelfile").read_text()) == [("FROM", "./n.gguf")]
    with (tmp_path / "Modelfile").open("a") as file:
        file.write("PARAMETER seed 1\n")
    shutil.copy(tmp_path / "Modelfile", tmp_path / "copy")
    with pytest.raises(FileExistsError, match="Modelfile is not from jlora, or was changed since"):
        hub.save_modelfile(tmp_path / "m.gguf", base())
    with pytest.raises(ValueError, match=r"--out: .*U\+200B"):
        hub.save_modelfile(tmp_path / "m\u200b.gguf", base())
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "Modelfile").read_bytes()


def test_the_licence(base, tmp_path):
    """Its text, or else what the base's card says."""
    card = "---\nlicense: other\nlicense_name: llama3.2\nlicense_link: https://example.com/licence\n---\n"
    path = hub.save_modelfile(tmp_path / "m.gguf", base(**{"README.md": card}))
    assert read(path.read_text())[1:] == [("LICENSE", "llama3.2 https://example.com/licence")]
    path = hub.save_modelfile(tmp_path / "m.gguf", base(LICENSE='A licence\n\nof "words".\n'))
    assert read(path.read_text())[1:] == [("LICENSE", 'A licence\n\nof "words".\n')]
    path = hub.save_modelfile(tmp_path / "m.gguf", base(LICENSE="Page one\fpage two"))
    assert read(path.read_text())[1:] == [("LICENSE", "llama3.2 https://example.com/licence")]
