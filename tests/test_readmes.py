"""What READMEs and notebooks show works: Python runs, commands parse, and files, settings, options and names exist.

A file's Python blocks share one namespace, in order, in a folder that has what a reader of that README would have: a
model under the Hub's name, adapters, records. A block whose first line is `# NAME` is also that file. The text block
after a Python block is what it prints. `no-run: REASON` after the language says why a block does not run here.
"""

import ast
import contextlib
import dataclasses
import importlib
import io
import json
import pathlib
import re
import shlex
import struct
import typing

import jax
import nbformat
import pytest

from jlora import hub, lora
from jlora.cli import main
from jlora.cli.overrides import read_run
from jlora.cli.parsers import parse, parser
from jlora.train.config import RunConfig
from jlora.train.config.typed import group_of
from jlora.train.planning import topology

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("jlora", "configs", "scripts", "benchmarks", "tests", ".ci")
READMES = sorted([ROOT / "README.md", *(path for name in FOLDERS for path in (ROOT / name).rglob("README.md"))])
NAMES = [str(path.relative_to(ROOT)) for path in READMES]
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.ipynb"))
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SIZES = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
SIZES |= dict(num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=100000.0, max_position_embeddings=8192)
SIZES |= dict(model_type="llama", hidden_act="silu", tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
MOST_THAT_DO_NOT_RUN = 3

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.M | re.S)
SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)|\bsrc=\"([^\"]+)\"")
FILE = re.compile(
    r"[\w.@-]+(?:/[\w.@-]+)*\.(?:py|sh|toml|svg|md)|\.?(?:jlora|tests|configs|scripts|benchmarks|ci)/[\w./-]*"
)
HINTS = typing.get_type_hints(RunConfig)
GROUPS = {
    field.name: {one.name for one in dataclasses.fields(group)}
    for field in dataclasses.fields(RunConfig)
    if (group := group_of(field, HINTS[field.name]))
}


class Block(typing.NamedTuple):
    """A fenced block: its language, what follows the language, its code."""

    language: str
    mark: str
    code: str


def blocks(name):
    """The fenced blocks of a README."""
    return [
        Block(*match["info"].partition(" ")[::2], match["code"]) for match in FENCE.finditer((ROOT / name).read_text())
    ]


def spans(name):
    """The pieces of inline code of a README."""
    return [" ".join(text.split()) for text in SPAN.findall(FENCE.sub("", (ROOT / name).read_text()))]


def files_of(name):
    """File → content, for the blocks that begin with their file's name."""
    named = ((re.match(r"# ([\w-]+\.(?:py|yaml))\n", block.code), block) for block in blocks(name))
    return {match[1]: block.code for match, block in named if match}


def commands(name):
    """The command lines of a README's shell blocks, with continued lines joined; in a console block those after "$"."""
    found = []
    for block in blocks(name):
        if block.language in ("bash", "console"):
            lines = block.code.replace("\\\n", " ").splitlines()
            lines = [line[2:] for line in lines if line.startswith("$ ")] if block.language == "console" else lines
            found += [words for line in lines if (words := shlex.split(line, comments=True))]
    return found


@pytest.fixture
def reader(tmp_path, monkeypatch, model_folder, request):
    """Makes the current folder one with a README's files, and the repository's."""

    def prepare(name):
        monkeypatch.chdir(tmp_path)
        for folder in FOLDERS:
            (tmp_path / folder).symlink_to(ROOT / folder)
        for file, text in files_of(name).items():
            (tmp_path / file).write_text(text)
        model = tmp_path / HUB_ID
        model.parent.mkdir()
        if name == "README.md":
            write_architecture(model)
            request.getfixturevalue("byte_tokenizer").save_pretrained(model)
        else:
            model.symlink_to(model_folder)
        chat = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
        for file in ("train", "shop", "law"):
            (tmp_path / f"{file}.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
        if any("adapters/" in block.code for block in blocks(name)):
            write_adapters(tmp_path / "adapters")

    return prepare


def write_architecture(folder):
    """SmolLM2-135M with all weights zero, in a file that takes no room on a disk that knows holes."""
    width, hidden, keys = SIZES["hidden_size"], SIZES["intermediate_size"], 192
    layer = {f"mlp.{name}_proj": (hidden, width) for name in ("gate", "up")} | {"mlp.down_proj": (width, hidden)}
    layer |= {f"self_attn.{name}_proj": (width, width) for name in "qo"}
    layer |= {f"self_attn.{name}_proj": (keys, width) for name in "kv"}
    layer |= {f"{name}_layernorm": (width,) for name in ("input", "post_attention")}
    shapes = {"embed_tokens": (SIZES["vocab_size"], width), "norm": (width,)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(SIZES["num_hidden_layers"]) for name, shape in layer.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[f"model.{name}.weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES))
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_adapters(folder):
    """PEFT folders of the languages and tasks that the READMEs speak of."""
    _, params = hub.load(HUB_ID, dtype="float32")
    for seed, name in enumerate(("fr", "de", "sql")):
        config = lora.LoraConfig(r=2, init_lora_weights=False)
        hub.save_adapter(folder / name, lora.init(params, config, jax.random.key(seed)), base=HUB_ID)


@pytest.mark.parametrize("name", [name for name in NAMES if any(block.language == "python" for block in blocks(name))])
def test_python_runs_and_prints_what_is_said(name, reader):
    reader(name)
    space = {"__name__": "readme"}
    shown = blocks(name)
    for number, block in enumerate(shown):
        if block.language != "python" or block.mark:
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block.code, f"{name}, block {number + 1}", "exec"), space)
        if shown[number + 1 : number + 2] and shown[number + 1].language == "text":
            assert printed.getvalue() == shown[number + 1].code


def test_few_blocks_do_not_run_and_say_why():
    marked = [(name, block.mark) for name in NAMES for block in blocks(name) if block.mark]
    assert all(re.fullmatch(r"no-run: .+", mark) for _, mark in marked), marked
    assert len(marked) <= MOST_THAT_DO_NOT_RUN, marked


def test_every_block_has_a_language_that_is_checked():
    languages = {(name, block.language) for name in NAMES for block in blocks(name)}
    assert not {pair for pair in languages if pair[1] not in ("python", "bash", "console", "text", "yaml")}


@pytest.mark.parametrize("name", [name for name in NAMES if commands(name)])
def test_commands_parse(name, reader):
    reader(name)
    problems = []
    for words in commands(name):
        if words[0] == "jlora" and words[1] in main.COMMANDS:
            problems += [f"{shlex.join(words)}: {fault}" for fault in refused(words[1], words[2:])]
        elif words[0] in ("bash", "python") and words[1].endswith((".sh", ".py")):
            problems += [f"{shlex.join(words)}: {fault}" for fault in unknown_to_script(words[1], words[2:])]
        elif words[:2] not in (["pip", "install"], ["git", "clone"]):
            problems.append(f"{shlex.join(words)}: found {words[0]}, expected jlora, a script, or pip install")
    assert not problems, "\n".join(problems)


def code_of(name):
    """(the Python of a notebook, its shell commands as words without variables before them or a time limit)."""
    cells = [
        cell.source.replace("\\\n", " ") for cell in nbformat.read(ROOT / name, as_version=4).cells if "outputs" in cell
    ]
    lines = [line for cell in cells for line in cell.splitlines()]
    python = "\n".join(line for line in lines if not line.startswith("!"))
    given = {
        node.targets[0].id: node.value.value
        for node in ast.parse(python).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    shell = [line.removeprefix("# ")[1:].format(**given) for line in lines if line.removeprefix("# ").startswith("!")]
    return python, [words[words.index("jlora") :] if "jlora" in words else words for words in map(shlex.split, shell)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_valid_and_clean_and_its_commands_parse(name):
    notebook = nbformat.read(ROOT / name, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)
    python, shell = code_of(name)
    compile(python, name, "exec")
    assert {words[1] for words in shell if words[0] == "jlora"} >= {"data", "plan", "train", "eval", "publish"}
    unknown = [words for words in shell if words[0] != "jlora" and words[:2] != ["pip", "install"]]
    assert not unknown
    problems = [fault for words in shell if words[0] == "jlora" for fault in refused(words[1], words[2:])]
    assert not problems, "\n".join(problems)


def refused(command, arguments):
    """What `jlora command` says against the arguments, before it looks for a model."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            options = parse(command, arguments)
        if command == "plan":
            topology.parse(options.topology)
        if command in ("train", "plan"):
            read_run(options.config, options.overrides, options.sweep)
    except SystemExit:
        return [said.getvalue().splitlines()[-1]]
    except (ValueError, FileNotFoundError) as error:
        return [str(error)]
    return []


def unknown_to_script(path, arguments):
    """Options that the script's text does not have; what goes on to pytest or to a recipe is left to them."""
    if not (ROOT / path).is_file():
        return ["no such file"]
    # Shell scripts hand their arguments on: the quickstart to its Python script, the test script to pytest.
    handed = {"scripts/quickstart.sh": "scripts/quickstart.py", "scripts/test.sh": "tests/conftest.py"}
    text = "".join((ROOT / file).read_text() for file in (path, handed.get(path, path)))
    names = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    faults = [f"no option {name}" for name in names if not name.startswith("--config.") and name not in text]
    return faults + [fault for word in arguments if word.startswith("--config.") for fault in unknown_setting(word)]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_named_exists(name):
    """Inline code: files, tests, settings, options, and what `jlora.` leads to. Links: files."""
    text = FENCE.sub("", (ROOT / name).read_text())
    links = [first or second for first, second in LINK.findall(text)]
    links = [link.partition("#")[0] for link in links if not re.match(r"https?:|#", link)]
    problems = [f"link {link}" for link in links if not ((ROOT / name).parent / link).exists()]
    own = files_of(name)
    for span in spans(name):
        words = span.split()
        ours = words[0] in ("jlora", "python", "bash") or words[0].startswith("--") or "/" in words[0]
        command = words[1] if words[0] == "jlora" and words[1:2] and words[1] in main.COMMANDS else None
        for word in (word.strip("()[],;") for word in words):
            if word.startswith("--"):
                problems += unknown_option(word, command) if ours else []
            elif FILE.fullmatch(word.partition(":")[0]):
                problems += [] if word.partition(":")[0] in own else missing(word, (ROOT / name).parent)
            elif re.match(r"jlora\.\w", word):
                problems += nowhere(word)
            elif re.fullmatch(rf"(?:{'|'.join(GROUPS)})\.(?!safetensors)\w+(?:=.*)?", word):
                problems += unknown_setting(word)
    assert not problems, "\n".join(problems)


def missing(word, folder):
    """A fault if there is no such file, or no such test in it; a word in capitals stands for any name."""
    path, _, test = word.partition("::")
    path = path.partition(":")[0]
    if re.search(r"\b[A-Z]{3,}\b", path.replace("README", "")):
        path = path.rpartition("/")[0]
    found = next((base / path for base in (folder, ROOT) if (base / path).exists()), None)
    if found is None:
        return [f"file {word}"]
    return [f"test {word}"] if test and f"def {test}(" not in found.read_text() else []


def unknown_setting(word):
    """A fault if there is no such setting; a word in capitals stands for any."""
    group, _, key = word.removeprefix("--config.").partition("=")[0].partition(".")
    whole = group == "algorithm" or (group in GROUPS and not dataclasses.is_dataclass(HINTS[group]))
    if group.isupper() or (whole and not key) or group == "adapters" or key in GROUPS.get(group, ()):
        return []
    return [f"setting {word}"]


def unknown_option(word, command):
    """A fault if the command, or where none is named any command or script, does not take the option."""
    name = word.partition("=")[0]
    if name.startswith("--config."):
        return unknown_setting(word)
    if command is None:
        scripts = [
            path for folder in FOLDERS[2:] for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")
        ]
        known = any(name in text.split() or f'"{name}"' in text for text in (path.read_text() for path in scripts))
        known = known or any(name in options(other) for other in main.COMMANDS)
    else:
        known = name in options(command)
    return [] if known else [f"option {word}"]


def options(command):
    """The options of a command."""
    return {option for action in parser(command)._actions for option in action.option_strings}


def nowhere(word):
    """A fault if `jlora.a.b` is neither a module nor something in one."""
    path = re.match(r"[\w.]+", word)[0].rstrip(".").split(".")
    found = importlib.import_module("jlora")
    for depth, part in enumerate(path[1:], start=2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(path[:depth]))
            except ImportError:
                return [f"name {word}"]
        found = getattr(found, part)
    return []


def test_the_picture_shows_the_tree(make_llama):
    """Each leaf of the drawing is a leaf of a Llama's tree, and grey or coloured as `split` has it."""
    drawing = (ROOT / "jlora" / "lora" / "tree.svg").read_text()
    drawn = re.findall(r'class="(frozen|trainable)" [^\n]*height="20"[^\n]*\n *<text [^>]*>(\w+)<', drawing)
    folder = make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)
    params = lora.init(hub.load(folder, dtype="float32")[1], lora.LoraConfig(r=2), jax.random.key(0))
    halves = dict(zip(("frozen", "trainable"), lora.split(params), strict=True))
    names = {half: {path.rpartition("/")[2] for path in lora_paths(tree)} for half, tree in halves.items()}
    assert {half: {name for kind, name in drawn if kind == half} for half in names} == names


def lora_paths(tree):
    """Paths of the leaves of a nested dict."""
    for name, value in tree.items():
        yield from (f"{name}/{rest}" for rest in lora_paths(value)) if isinstance(value, dict) else [name]
