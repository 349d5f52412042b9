"""Tokenizers: the same ids, template and end of text as what they were saved from, out of a folder and out of GGUF."""

import json
import subprocess
import sys

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jlora import hub
from jlora.errors import UserError
from jlora.hub.gguf.tokenizer import LLAMA3_SPLIT, named, strips_spaces, tokenizer_metadata

TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
TEXTS = ["ab ab  ab", "a  12 b", "   7", "ba 345, ab"]


def byte_level(*, digits: bool) -> Tokenizer:
    """A byte-level BPE with a few merges, runs of spaces among them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "Ġ"), ("Ġ", "ab"), ("Ġ", "1")]
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_gguf(path, tokenizer: Tokenizer, pre: str, *, add_bos: bool = False):
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(vocab) - 2))
    writer.add_token_merges(["a b", "Ġ Ġ", "Ġ ab", "Ġ 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_from_a_folder(llama_folder):
    from transformers import PreTrainedTokenizerFast

    folder, _ = llama_folder()
    saved = PreTrainedTokenizerFast(tokenizer_object=byte_level(digits=True), bos_token="<s>", eos_token="</s>")
    saved.chat_template = TEMPLATE
    saved.save_pretrained(folder)
    loaded = hub.load_tokenizer(folder)
    assert [loaded(text).input_ids for text in TEXTS] == [saved(text).input_ids for text in TEXTS]
    assert (loaded.eos_token, loaded.chat_template) == ("</s>", TEMPLATE)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_from_gguf(tmp_path, pre):
    original = byte_level(digits=pre == "smollm")
    write_gguf(tmp_path / "tiny.gguf", original, pre)
    loaded = hub.load_tokenizer(tmp_path)
    assert [loaded(text).input_ids for text in TEXTS] == [original.encode(text).ids for text in TEXTS]
    assert original.encode("a  12 b").ids != byte_level(digits=pre != "smollm").encode("a  12 b").ids
    assert (loaded.eos_token_id, loaded.chat_template) == (1, TEMPLATE)
    assert [loaded.decode(loaded(text).input_ids) for text in TEXTS] == TEXTS
    loaded.save_pretrained(tmp_path / "saved")
    again = hub.load_tokenizer(tmp_path / "saved")
    assert [again(text).input_ids for text in TEXTS] == [loaded(text).input_ids for text in TEXTS]


def test_from_gguf_with_a_begin_token(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", byte_level(digits=True), "smollm", add_bos=True)
    loaded = hub.load_tokenizer(tmp_path)
    assert loaded("ab").input_ids == [0, *byte_level(digits=True).encode("ab").ids]
    assert loaded("<s>ab</s>", add_special_tokens=False).input_ids == [0, *byte_level(digits=True).encode("ab").ids, 1]
    assert loaded.decode(loaded("ab</s>").input_ids, skip_special_tokens=True) == "ab"


def test_gguf_needs_no_torch(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", byte_level(digits=True), "smollm")
    write_gguf(tmp_path / "other.gguf", byte_level(digits=True), "qwen2")
    code = (
        "import importlib.util, sys\n"
        "sys.modules['torch'] = None\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from jlora import hub\n"
        f"print(hub.load_tokenizer({str(tmp_path / 'tiny.gguf')!r})('a  12 b').input_ids)\n"
        f"hub.load_tokenizer({str(tmp_path / 'other.gguf')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(byte_level(digits=True).encode("a  12 b").ids), done.stderr
    assert "'gpt2' / 'qwen2'" in done.stderr and "pip install torch" in done.stderr


def test_an_exported_model_has_its_tokenizer(llama_folder, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", byte_level(digits=True), "smollm")
    tokenizer = hub.load_tokenizer(tmp_path / "tiny.gguf")
    model, params = hub.load(llama_folder()[0])
    hub.save_model(tmp_path / "out", model, params, tokenizer)
    loaded = hub.load_tokenizer(tmp_path / "out")
    assert loaded("a  12 b").input_ids == tokenizer("a  12 b").input_ids
    assert loaded.chat_template == TEMPLATE


def test_a_folder_without_a_tokenizer(llama_folder):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        hub.load_tokenizer(llama_folder()[0])


def test_a_gguf_file_without_a_tokenizer(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FileNotFoundError, match=r"bare\.gguf has no tokenizer"):
        hub.load_tokenizer(tmp_path / "bare.gguf")


def sentence_pieces() -> Tokenizer:
    """What transformers makes of SentencePiece's BPE: "▁" for spaces, bytes for what is unknown."""
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁"), ("1", "2")]
    single = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ab123,"]
    vocab = {token: i for i, token in enumerate([*single, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def split_by(pattern: str, **settings) -> Tokenizer:
    """A byte-level BPE that splits by a regular expression, as Llama 3's and Qwen's do."""
    tokenizer = byte_level(digits=False)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer.model = models.BPE(model["vocab"], merges, **settings)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


QWEN2 = LLAMA3_SPLIT.replace("{1,3}", "")
# How a tokenizer splits → llama.cpp's names of its kind and of its splits.
WRITTEN = {
    "gpt-2": (lambda: byte_level(digits=False), "gpt2", "gpt-2"),
    "smollm": (lambda: byte_level(digits=True), "gpt2", "smollm"),
    "llama 3": (lambda: split_by(LLAMA3_SPLIT, ignore_merges=True), "gpt2", "llama-bpe"),
    "qwen 2": (lambda: split_by(QWEN2), "gpt2", "qwen2"),
    "sentencepiece": (sentence_pieces, "llama", "default"),
    "phi-3": (lambda: phi3_like().backend_tokenizer, "llama", "default"),
}


def written(kind, folder):
    """The tokenizer, after writing it into the folder's tiny.gguf."""
    from transformers import PreTrainedTokenizerFast

    make, family, pre = WRITTEN[kind]
    original = PreTrainedTokenizerFast(tokenizer_object=make(), bos_token="<s>", eos_token="</s>")
    original.add_tokens([AddedToken("<tool>", normalized=False, rstrip=kind == "phi-3")])
    original.chat_template = TEMPLATE
    rows = len(original) + 3
    found = tokenizer_metadata(original, rows, (original.eos_token_id, 4))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == (family, pre)
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == rows
    assert found["tokenizer.ggml.eot_token_id"] == 4
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_name(named("tiny", strips=strips_spaces(original)))
    for key, value in found.items():
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return original


@pytest.mark.parametrize("kind", WRITTEN)
def test_to_gguf_and_back(kind, tmp_path):
    """What is written of a tokenizer is read as the same tokenizer, by jlora or transformers."""
    from transformers import AutoTokenizer

    _, family, pre = WRITTEN[kind]
    original = written(kind, tmp_path)
    if pre in ("gpt-2", "smollm"):
        read = hub.load_tokenizer(tmp_path / "tiny.gguf")
    elif family == "llama":
        read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    else:  # nobody but llama.cpp reads these splits from GGUF
        return
    for text in (*TEXTS, "ab<tool>ab</s>"):
        if family == "llama" and (text.startswith(" ") or "<tool>" in text):
            continue  # transformers' reading of GGUF puts spaces otherwise; llama.cpp does as SentencePiece
        assert read(text, add_special_tokens=False).input_ids == original(text).input_ids, text
    assert (read.eos_token, read.chat_template) == ("</s>", TEMPLATE)


def test_to_gguf_only_what_llama_cpp_splits_alike():
    from transformers import PreTrainedTokenizerFast

    unknown = PreTrainedTokenizerFast(tokenizer_object=split_by(r"\w+|\W"), eos_token="</s>")
    with pytest.raises(ValueError, match=r"no name for how this tokenizer splits text.*w\+\|"):
        tokenizer_metadata(unknown, 300, ())
    known = PreTrainedTokenizerFast(tokenizer_object=byte_level(digits=True), eos_token="</s>")
    with pytest.raises(ValueError, match="the model 9 rows"):
        tokenizer_metadata(known, 9, ())
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="BPE, not for 'WordLevel'"):
        tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"), 9, ())


ADDED = {"</s>": True, "<unk>": False, "<s>": False, "<|endoftext|>": False, "<|user|>": True, "<|end|>": True}


def phi3_like(added=ADDED, **settings):
    """SentencePiece's kind, with tokens that take the spaces after them or not."""
    from transformers import PreTrainedTokenizerFast

    backend = sentence_pieces()
    backend.add_tokens(
        [AddedToken(token, rstrip=rstrip, normalized=False, **settings) for token, rstrip in added.items()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")


@pytest.mark.parametrize(("tokens", "strips"), [(ADDED, True), (dict.fromkeys(ADDED, False), False)])
@pytest.mark.parametrize("name", ["Phi-3 mine", "my_phi3", "mine"])
def test_llama_cpp_strips_by_the_name(name, tokens, strips):
    """It takes the spaces after special tokens away where general.name has one of these words, and nowhere else."""
    called = named(name, strips=strips_spaces(phi3_like(tokens)))
    assert ("phi3" in called.lower() or "phi-3" in called.lower()) == strips
    assert (called == name) == (strips == ("phi" in name.lower()))


def test_a_file_has_a_name_by_which_its_tokenizer_strips(llama_folder, tmp_path):
    model, params = hub.load(llama_folder(vocab_size=300)[0])
    called = []
    for name, tokenizer in (
        ("mine", phi3_like()),
        ("taken", tmp_path / "mine.gguf"),
        ("phi3", phi3_like(dict.fromkeys(ADDED, False))),
        ("phi3-ids", None),
    ):
        hub.save_gguf(tmp_path / f"{name}.gguf", model, params, tokenizer)
        called.append(gguf.GGUFReader(tmp_path / f"{name}.gguf").fields["general.name"].contents())
    assert called == ["mine phi-3", "taken phi-3", "phi 3", "phi3-ids"]


def test_to_gguf_only_what_llama_cpp_strips_alike():
    with pytest.raises(ValueError, match=r"around these tokens: </s>, <\|end\|>, <\|user\|>;"):
        strips_spaces(phi3_like(ADDED | {"<|tool|>": False}))
    padded = phi3_like({"<pad>": True})
    padded.pad_token = "<pad>"  # stands in no text
    assert not strips_spaces(padded)
    for settings in (dict(lstrip=True), dict(single_word=True)):
        with pytest.raises(ValueError, match=r"around these tokens: .*<tool>"):
            strips_spaces(phi3_like({"<tool>": False}, **settings))


@pytest.mark.parametrize(
    ("make", "normalizer"),
    [
        (lambda: byte_level(digits=True), normalizers.Lowercase()),
        (lambda: byte_level(digits=True), normalizers.Replace("a", "b")),
        (sentence_pieces, normalizers.NFKC()),
        (sentence_pieces, normalizers.Replace("a", "b")),
    ],
)
def test_to_gguf_only_what_llama_cpp_normalizes_alike(make, normalizer):
    from transformers import PreTrainedTokenizerFast

    backend = make()
    steps = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*steps, normalizer])
    with pytest.raises(ValueError, match=f"llama.cpp does not do .*{type(normalizer).__name__}"):
        tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), 300, ())


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITTEN)
def test_llama_cpp_gives_the_same_ids(kind, tmp_path, llama_cpp):
    original = written(kind, tmp_path)
    opened = llama_cpp(tmp_path / "tiny.gguf", vocab_only=True)
    for text in (*TEXTS, "ab<tool>ab</s>", "ab<tool> \n ab</s> <s>  a", "12345 ab's", "\n\n a"):
        found = opened.tokenize(text.encode(), add_bos=False, special=True)
        assert found == original(text, add_special_tokens=False).input_ids, text


def _set(*path):
    *names, last, value = path

    def change(content):
        for name in names:
            content = content[name]
        content[last] = value

    return change


DAMAGE = {
    "number": ("tokenizer.json", _set("model", "vocab", "a", 1e9)),
    "merge": ("tokenizer.json", _set("model", "merges", [["a", "?!"]])),
    "version": ("tokenizer.json", _set("version", "9.0")),
    "regular expression": (
        "tokenizer.json",
        _set("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}),
    ),
    "unknown token after the text": (  # a panic of Rust's, once a text is read
        "tokenizer.json",
        _set("post_processor", "single", [{"SpecialToken": {"id": "<none>", "type_id": 0}}]),
    ),
    "no model": ("tokenizer.json", _set("model", None)),
    "end of text": ("tokenizer_config.json", _set("eos_token", {"a": 1})),
    "class": ("tokenizer_config.json", _set("tokenizer_class", 7)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_whatever_transformers_and_tokenizers_raise_names_the_folder(name, byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path)
    file, change = DAMAGE[name]
    content = json.loads((tmp_path / file).read_text())
    change(content)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{tmp_path}: the tokenizer \(.*tokenizer\.json.*\) cannot be opened: \w+"):
        hub.load_tokenizer(tmp_path)


def test_a_template_is_a_text(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content | {"chat_template": 5}))
    with pytest.raises(UserError, match="chat_template is int, expected a text"):
        hub.load_tokenizer(tmp_path)


def test_no_code_of_the_folder_is_run(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    content |= {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}, "tokenizer_class": "Mine"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="custom code"):
        hub.load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
