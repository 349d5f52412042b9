"""Paths: one file or many, a folder, a pattern, a data set of the Hub; what leaves open what to read is refused."""

import json

import datasets
import pytest

from jlora.data import digest, read_records
from jlora.data.paths import locate
from jlora.data.sources import as_sources
from jlora.errors import MissingFileError, UserError


def row(number):
    return {"prompt": f"q{number}", "completion": f"a{number}"}


def write(path, *numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in numbers))
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "shards" / "b.jsonl", 2, 3)
    write(tmp_path / "shards" / "a.jsonl", 0, 1)
    write(tmp_path / "shards" / "deep" / "c.jsonl", 4)
    (tmp_path / "shards" / "README.md").write_text("About the data.")
    (tmp_path / "shards" / ".hidden.jsonl").write_text("no")
    return tmp_path / "shards"


def test_several_files_are_read_one_after_another(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for where, numbers in (
        ("shards", [0, 1, 2, 3, 4]),
        (folder, [0, 1, 2, 3, 4]),
        ("shards/*.jsonl", [0, 1, 2, 3]),
        ("shards/**/*.jsonl", [0, 1, 2, 3, 4]),
        ("shards/b.jsonl,shards/a.jsonl", [2, 3, 0, 1]),
        (["shards/deep", folder / "a.jsonl"], [4, 0, 1]),
    ):
        assert read_records(where) == [row(number) for number in numbers]
    assert list(as_sources("shards/*.jsonl").digests()) == ["shards/a.jsonl", "shards/b.jsonl"]
    before = digest("shards")
    write(folder / "deep" / "c.jsonl", 5)
    assert digest("shards") != before


def test_a_file_may_have_a_comma_and_a_star_in_its_name(tmp_path):
    for name in ("a,b.jsonl", "a*.jsonl", "[a].jsonl"):
        assert read_records(write(tmp_path / name, 1)) == [row(1)]


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("train/0.jsonl", "valid-0.jsonl")])
def test_a_folder_of_several_splits_is_not_read_as_one(tmp_path, names):
    for name in names:
        write(tmp_path / name, 1)
    with pytest.raises(UserError, match="found files of several splits"):
        read_records(tmp_path)


def test_splits_of_one_kind_and_words_that_hold_their_names_are_one(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "contest.jsonl", "constrain.jsonl"):
        write(tmp_path / name, 1)
    assert len(read_records(tmp_path)) == 4


def test_a_folder_of_several_kinds_is_not_read_as_one(tmp_path):
    write(tmp_path / "a.jsonl", 1)
    (tmp_path / "b.txt").write_text("words")
    with pytest.raises(UserError, match=r"files of several kinds \(.jsonl, .txt\), expected one: give a pattern"):
        read_records(tmp_path)


def test_all_paths_that_are_missing_are_named(tmp_path):
    with pytest.raises(UserError) as error:
        locate([tmp_path / "a.jsonl", tmp_path / "*.csv", tmp_path])
    words = str(error.value)
    assert "a.jsonl: found nothing there" in words
    assert "*.csv: found no file of this pattern" in words
    assert "found a folder without data files" in words


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of `datasets` with someone/questions: two subsets, of one split and of two."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for subset, splits in (("easy", ("train",)), ("hard", ("test", "train"))):
        folder = tmp_path / "cache" / "someone___questions" / subset / "0.0.0" / "abc"
        folder.mkdir(parents=True)
        info = datasets.DatasetInfo(
            builder_name="parquet", dataset_name="questions", config_name=subset, version="0.0.0"
        )
        info.splits = datasets.SplitDict(dataset_name="questions")
        for number, split in enumerate(splits):
            table = datasets.Dataset.from_list([row(number) | {"level": subset}])
            info.features = table.features
            with datasets.arrow_writer.ArrowWriter(
                path=str(folder / f"questions-{split}.arrow"), features=table.features
            ) as writer:
                writer.write_table(table.data.table)
                writer.finalize()
            info.splits[split] = datasets.SplitInfo(name=split, num_examples=1, dataset_name="questions")
        info.write_to_directory(str(folder))
    return tmp_path


def test_a_data_set_of_the_hub_is_read_from_the_cache(cached):
    assert read_records("someone/questions/easy") == [row(0) | {"level": "easy"}]
    assert read_records("someone/questions/hard:test") == [row(0) | {"level": "hard"}]
    assert read_records("someone/questions/hard") == [row(1) | {"level": "hard"}]
    assert digest("someone/questions/hard:test") != digest("someone/questions/hard")


def test_a_data_set_that_is_not_there_is_one_message(cached, monkeypatch):
    for name, words in (
        ("someone/questions/hard:none", "none"),
        ("someone/nothing", "someone/nothing"),
        ("someone/questions/other", "other"),
    ):
        with pytest.raises(UserError) as error:
            read_records(name)
        assert str(error.value).startswith(f"{name}: found no file or folder there, and as a data set of the Hub")
        assert words in str(error.value)
    # A folder of this name is there, so its file was meant.
    monkeypatch.chdir(cached)
    with pytest.raises(MissingFileError, match="cache/train: found nothing there"):
        read_records("cache/train")
