"""lm-evaluation-harness for jlora's models: packed, sharded and adapted params are evaluated as they are.

    import lm_eval
    from jlora.harness import JaxLM

    lm_eval.simple_evaluate(JaxLM(model, params, tokenizer), tasks=["hellaswag"], limit=100)

Needs the extra `harness`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlora.data import Example, fitted
from jlora.data.template import text_tokens
from jlora.errors import raise_all
from jlora.generate import generate
from jlora.lora import Bank
from jlora.models import Model
from jlora.train.evaluation.records import example_sums
from jlora.types import Params, require

TemplateLM: Any = require("lm_eval.api.model", "harness").TemplateLM
utils: Any = require("lm_eval.utils", "harness")

# The generation settings that a request may have: transformers' names and the harness's own.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GENERATION = ("until", *LENGTHS, "do_sample", "temperature", "top_k", "top_p")
# Other settings that tasks give. IDLE maps each to the value that changes nothing, as None does for every setting;
# SAMPLING does so for those that matter only when sampling. FREE are settings that never change the text here.
IDLE = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "n", "best_of", "repetition_penalty"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "min_new_tokens", "min_length", "penalty_alpha", "diversity_penalty"), 0),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), 0),
}
SAMPLING = {"min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "seed": None}
FREE = ("length_penalty", "early_stopping", "use_cache", "pad_token_id", "cache_implementation")


class JaxLM(TemplateLM):
    """A model and its params for the harness; likelihoods and texts match those of its Hugging Face class.

    Args:
        params: with or without an adapter, packed or not.
        batch_size: rows at a time.
        max_length: tokens per row when scoring likelihoods; longer requests lose their start, as in the harness
            (prompts to continue are read whole). Default: the model's number of positions, at most 2,048.
        max_gen_toks: the most new tokens, unless the request says.
        mesh: splits the rows when scoring likelihoods, as in training.

    Raises:
        TypeError: the params are a bank's.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        super().__init__()
        if isinstance(params, Bank):
            raise TypeError("params: found a bank; give one adapter's (Bank.alone)")
        self.model, self.params, self.mesh = model, params, mesh
        self.tokenizer = fitted(tokenizer, model.config.vocab_size)
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self.max_length = max_length or min(model.config.max_position_embeddings, 2048)
        model.require_positions(self.max_length, "max_length")

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the beginning of text, or else the end of text."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, by default as `generate` reads a text: special tokens are added unless it begins with one."""
        if add_special_tokens is None:
            return text_tokens(string, self.tokenizer).tolist()
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding would produce it) for each request."""
        examples = []
        for _, context, continuation in requests:
            tokens = np.array((context + continuation)[-(self.max_length + 1) :], np.int32)
            examples.append(Example(tokens, np.arange(len(tokens)) >= len(tokens) - len(continuation)))
        sums = example_sums(
            self.model,
            self.params,
            examples,
            batch_size=self.batch_size,
            seq_len=self.max_length,
            mesh=self.mesh,
        )
        return [
            (-float(loss), bool(correct == tokens))
            for loss, correct, tokens in zip(sums.loss, sums.correct, sums.tokens, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of `max_length` tokens that do not overlap."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            rolled = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, rolled):
                windows.append((None, *window))
                owners.append(owner)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [score for score, _ in self._loglikelihood_tokens(windows)])
        return totals.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each prompt, up to its request's first stop string."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        raise_all(fault for numbers in groups.values() for fault in _faults(requests[numbers[0]].args[1]))
        for numbers in groups.values():
            asked = requests[numbers[0]].args[1]
            sampled = asked.get("do_sample", False)
            found = generate(
                self.model,
                self.params,
                self.tokenizer,
                [requests[number].args[0] for number in numbers],
                max_new_tokens=next((asked[name] for name in LENGTHS if asked.get(name)), self.max_gen_toks),
                temperature=asked.get("temperature", 1.0) if sampled else 0.0,
                top_k=asked.get("top_k", 0) if sampled else 0,
                top_p=asked.get("top_p", 1.0) if sampled else 1.0,
                batch_size=self.batch_size,
            )
            until = asked.get("until") or []
            for number, text in zip(numbers, found, strict=True):
                texts[number] = _before(text, [until] if isinstance(until, str) else until)
        return texts


def _faults(asked: Mapping[str, Any]) -> list[str]:
    """One fault for each setting that would change the text and that jlora does not support; others are ignored."""
    idle = IDLE | (SAMPLING if asked.get("do_sample") else {})
    left = set(asked) - {*GENERATION, *FREE, *(() if asked.get("do_sample") else SAMPLING)}
    refused = [name for name in sorted(left) if asked[name] is not None and not _changes_nothing(name, asked, idle)]
    faults = [
        f"generation: {name}={asked[name]!r} is not supported"
        + (f"; leave it out or give {idle[name]}" if idle.get(name) is not None else f", only {', '.join(GENERATION)}")
        for name in refused
    ]
    lengths = {name: asked[name] for name in LENGTHS if asked.get(name) is not None}
    if len(set(lengths.values())) > 1:
        faults.append(f"generation: {lengths} differ; give one of them")
    return faults


def _changes_nothing(name: str, asked: Mapping[str, Any], idle: Mapping[str, Any]) -> bool:
    return name in idle and idle[name] is not None and asked[name] == idle[name]


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
