"""Model cards, read back by the Hub's own classes."""

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from jlora.hub import cards


def test_a_card_comes_back(tmp_path):
    card = cards.Card(
        "A: card", bases=["a/one", "b/two"], relation="merge", license={"license": "mit"}, sections=["## One", "two"]
    )
    (tmp_path / cards.FILE).write_text(str(card))
    found = ModelCard.load(tmp_path / cards.FILE)
    assert (
        found.data.to_dict()
        == cards.header_of(tmp_path)
        == {
            "base_model": ["a/one", "b/two"],
            "base_model_relation": "merge",
            "library_name": "transformers",
            "license": "mit",
            "pipeline_tag": "text-generation",
            "tags": ["jlora", "lora"],
        }
    )
    assert cards.is_own(tmp_path) and cards.how_made(tmp_path) == ""


def test_a_models_card_names_no_place_on_this_machine(tmp_path):
    made = cards.model_card(
        tmp_path / "merged", ["a/one", str(tmp_path)], "By hand.\n\n```yaml\nx: 1\n```", relation="merge"
    )
    (tmp_path / cards.FILE).write_text(str(made))
    header = cards.header_of(tmp_path)
    assert "base_model" not in header and header["tags"] == ["jlora"]
    assert "# merged" in str(made) and str(tmp_path) not in str(made)
    assert cards.how_made(tmp_path) == "## How it was made\n\nBy hand.\n\n```yaml\nx: 1\n```"
    both = cards.model_card("x", ["a/one", "b/two"], relation="merge", lora=True)
    (tmp_path / cards.FILE).write_text(str(both))
    assert cards.header_of(tmp_path)["base_model"] == ["a/one", "b/two"] and cards.how_made(tmp_path) == ""


@pytest.mark.parametrize(
    "text", ["", "# No header", "---\na: [\n---\n", "---\n- list\n---\n", "---\ntags: jlora-like\n---\n"]
)
def test_other_cards_are_not_ours(tmp_path, text):
    (tmp_path / cards.FILE).write_text(text)
    assert not cards.is_own(tmp_path) and cards.how_made(tmp_path) == ""


def test_the_licence_of_a_base(tmp_path, monkeypatch):
    """From its folder's card, its config, or its card in the Hub's cache; nothing else is asked."""
    assert cards.license_of(str(tmp_path)) == {}
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert cards.license_of(str(tmp_path)) == {"license": "mit"}
    (tmp_path / cards.FILE).write_text("---\nlicense: other\nlicense_name: own\n---\n")
    assert cards.license_of(str(tmp_path)) == {"license": "other", "license_name": "own"}
    asked = {("a/one", cards.FILE): str(tmp_path / cards.FILE)}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: asked.get(names))
    assert cards.license_of("a/one")["license"] == "other" and cards.license_of("a/two") == {}


def test_what_the_hub_calls_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "one").mkdir(parents=True)
    assert [cards.hub_id(base) for base in ("a/one", "gpt2", "models/one", "/m/one", "~/one", "a/b/c", None)] == [
        *("a/one", "gpt2"),
        *[None] * 5,
    ]
