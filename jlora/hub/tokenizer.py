"""The transformers tokenizer of a checkpoint, chat template included."""

from pathlib import Path
from typing import TYPE_CHECKING

from jlora.hub.gguf import pre_tokenizer_name
from jlora.hub.source import locate
from jlora.types import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer that belongs to the model at `source`: a folder, a Hub id or a GGUF file.

    Raises:
        FileNotFoundError: there is no such source, or it has no tokenizer.
    """
    # Slow to import, and of no use to those who bring token ids.
    import transformers

    path = locate(source)
    if path.suffix == ".gguf":
        require("gguf", "gguf")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        _split_as_trained(tokenizer, pre_tokenizer_name(path))
        return tokenizer
    if not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        raise FileNotFoundError(f"{path} has no tokenizer.json, tokenizer.model or vocab file")
    return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _split_as_trained(tokenizer: "PreTrainedTokenizerBase", name: str | None) -> None:
    """Digits split off first, where the vocabulary was trained so; transformers reads the merges but not this rule."""
    if name == "smollm":
        from tokenizers import pre_tokenizers

        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, tokenizer.backend_tokenizer.pre_tokenizer]
        )
