"""What is asked of the engine, and what it answers with."""

import dataclasses
from collections.abc import Callable, Sequence

from jlora.errors import Failed, UserError, describe_faults
from jlora.generate.rollouts import faults
from jlora.serve.rows import TOP

SEEDS = 1 << 64


class Busy(Failed):
    """The queue is full: the same request may be taken later."""


class TooLong(UserError):
    """A prompt, alone or with its continuation, is longer than what there is room for."""


class Stopping(Failed):
    """The engine takes no more requests."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; see `jlora.generate.sampling.Settings`. The defaults draw from the model's own."""

    temperature: int | float = 1.0
    top_k: int = 0
    top_p: int | float = 1.0
    min_p: int | float = 0.0
    repetition_penalty: int | float = 1.0
    presence_penalty: int | float = 0.0
    frequency_penalty: int | float = 0.0

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens the row has."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
        tokens: the prompt's.
        max_new_tokens: the most new tokens.
        adapter: its name; None is the base alone.
        seed, choice: what is drawn depends on these two and on the number of the token, as in `jlora.generate` for the
            prompt of this number.
        stop: strings that end the text, which are not a part of it.
        stop_ids: tokens that end the text, besides the model's own.
        ignore_end: whether the model's own do not.
        top: how many of the likeliest tokens are told of each one; None: not even its own probability.
        kept: special tokens that are a part of the text.
        begun: how many of the prompt's last tokens belong to the answer: they are told and counted with it.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    adapter: str | None = None
    sampling: Sampling = Sampling()
    seed: int = 0
    choice: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    top: int | None = None
    kept: tuple[int, ...] = ()
    begun: int = 0

    def check(self, longest: int) -> None:
        """Raises UserError if it cannot be answered, `TooLong` if that is why; all faults are listed.

        Args:
            longest: the most tokens of a prompt and its continuation.
        """
        found = faults(dict(max_new_tokens=self.max_new_tokens) | dataclasses.asdict(self.sampling))
        error = UserError
        if not len(self.tokens):
            found.append("the prompt is empty: there is nothing to continue")
        elif len(self.tokens) >= longest:
            error = TooLong
            found.append(f"the prompt has {len(self.tokens)} tokens, expected fewer than {longest}")
        elif len(self.tokens) + self.max_new_tokens > longest:
            error = TooLong
            found.append(
                f"the prompt's {len(self.tokens)} tokens and max_tokens={self.max_new_tokens} are more than {longest}"
            )
        if not 0 <= (self.top or 0) <= TOP:
            found.append(f"top_logprobs={self.top}: expected 0 to {TOP}")
        if any(not text for text in self.stop):
            found.append("stop: found an empty text, expected none or texts that end an answer")
        if found:
            raise error(describe_faults("the request cannot be answered", found))


@dataclasses.dataclass(frozen=True)
class Token:
    """A new token, and, if asked for, how likely it was: log-probabilities of the model's own distribution.

    Attributes:
        top: the likeliest tokens with theirs.
    """

    number: int
    log_prob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
    """How many tokens a prompt has, how many of these were known from before, and how many its answer has."""

    prompt: int
    cached: int
    completion: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of an answer.

    Attributes:
        text: what can be told by now; a stop string that may have begun is kept back.
        finish: in the last piece, "stop", "length", "cancelled" or "error".
        error: what went wrong.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    usage: Usage | None = None
    error: str | None = None


Listener = Callable[[Piece], None]
