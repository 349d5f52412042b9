"""From text and messages to tokens: the tokenizer, its chat template, and what the template writes after an answer."""

import functools
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora.data.tokens import Text, plain_text, tokenize
from jlora.data.vocabulary import require_rows, unfitted
from jlora.ends import behind_words, chat_text
from jlora.errors import UserError, first_few, number_of

ROLES_SHOWN = 12
FOLD_HINT = 'data.system="fold" (--fold_system) puts the system text at the beginning of the first user\'s turn'
# Prepended to a template, so that all its readers fold alike: training, exports, and whatever serves those.
FOLD = (
    "{%- if messages | length > 1 and messages[0]['role'] in ('system', 'developer') and messages[1]['role'] == 'user'"
    " %}{%- set messages = [dict(messages[1], content=messages[0]['content'] + '\n\n' + messages[1]['content'])]"
    " + messages[2:] %}{%- endif %}"
)


def template_variables(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record gives the chat template besides its messages: its tools and its chat_template_kwargs.

    An empty list of tools is left out, as if there were none.
    """
    return ({"tools": record["tools"]} if record.get("tools") else {}) | record.get("chat_template_kwargs", {})


def fold_system(tokenizer: Any) -> None:
    """Makes the tokenizer's chat template write a system text at the start of the first user's turn.

    This changes the template itself, so that it is the same wherever the tokenizer goes, exports included.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    tokenizer = unfitted(tokenizer)
    template = tokenizer.chat_template
    if not template:
        raise UserError('data.system="fold": the tokenizer has no chat template that a system text could be folded for')
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _folding(text) for name, text in template.items()}
    else:
        tokenizer.chat_template = _folding(template)


def text_tokens(text: str, tokenizer: Any, *, end: bool = False) -> np.ndarray:
    """The tokens of plain text, int32 [T]; with `end`, the last one is the tokenizer's end-of-text token."""
    [found] = tokenize([plain_text(text, tokenizer)], tokenizer)
    return end_with_eos(found.ids, tokenizer) if end else found.ids


def end_with_eos(tokens: np.ndarray, tokenizer: Any) -> np.ndarray:
    """The tokens with the tokenizer's end-of-text token as the last one."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no end-of-text token, so the model could not learn to stop; set eos_token")
    require_rows([eos], tokenizer)
    return tokens if len(tokens) and tokens[-1] == eos else np.append(tokens, np.int32(eos))


def rendered_tokens(text: str, tokenizer: Any) -> np.ndarray:
    """The tokens of a chat template's output, which contains its special tokens already."""
    return tokenize([Text(text)], tokenizer)[0].ids


def render(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    *,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text that the chat template makes of the messages and of `variables`, such as tools.

    Raises:
        UserError: the template refuses the messages, or fails on them in any way; or `variables` has the name of a
            setting of `apply_chat_template`, such as another template.
    """
    import jinja2  # transformers renders chat templates with it

    if not messages:
        return ""
    if taken := sorted(_settings() & set(variables or ())):
        raise UserError(
            f"chat_template_kwargs: found {first_few(taken, 8)}, which no chat template reads: leave it out"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **(variables or {})
        )
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything, as may what it calls
        roles = [message["role"] for message in messages]
        shown = ", ".join(roles if len(roles) <= ROLES_SHOWN else [*roles[:ROLES_SHOWN], f"… {len(roles)} in all"])
        reason = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        system = roles[0] in ("system", "developer")
        hint = f"; {FOLD_HINT}" if system and _writes(messages[1:], tokenizer, add_generation_prompt, variables) else ""
        raise UserError(f"the chat template refuses the roles {shown}: {reason}{hint}") from error


@functools.cache
def _settings() -> frozenset[str]:
    """What `apply_chat_template` takes for itself, and does not hand to the template."""
    import transformers

    taken = set(inspect.signature(transformers.PreTrainedTokenizerBase.apply_chat_template).parameters)
    return frozenset(taken - {"tools", "documents", "kwargs"} | {"messages"})


def _writes(messages: list[dict[str, Any]], tokenizer: Any, ask: bool, variables: Mapping[str, Any] | None) -> bool:
    """Whether the template writes these messages."""
    try:
        render(messages, tokenizer, add_generation_prompt=ask, variables=variables)
    except UserError:
        return False
    return True


def require_template(tokenizer: Any, chats: Sequence[bool]) -> None:
    """Raises UserError if there are chats, as this says of each record, and the tokenizer has no chat template."""
    if any(chats) and not tokenizer.chat_template:
        raise UserError(
            f"{sum(chats)} of {number_of(len(chats), 'record')} are chats, but the tokenizer has no chat template; "
            'use a model whose tokenizer has one, or records with "prompt" and "completion" as plain text'
        )


def template_ending(tokenizer: Any) -> tuple[int, ...]:
    """The first special token that the template writes after an assistant's words; () if it writes none.

    Special tokens that directly follow it belong to it: Command R7B ends its response and then its turn.
    """
    tokens, stop = _behind_answer(tokenizer)
    special = special_tokens(tokenizer)
    return tuple(itertools.takewhile(special.__contains__, tokens[stop:]))


def template_tail(tokenizer: Any) -> list[int]:
    """The tokens that the chat template writes after the one that ends an answer; none without a template."""
    if not tokenizer.chat_template:
        return []
    tokens, stop = _behind_answer(tokenizer)
    return tokens[stop + 1 :]


def special_tokens(tokenizer: Any) -> set[int]:
    """The ids of a tokenizer's special tokens."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return special | set(tokenizer.all_special_ids)


def as_messages(side: str | list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    """Messages as they are, or a text as one message of the given role."""
    return [{"role": role, "content": side}] if isinstance(side, str) else side


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many leading tokens are the same."""
    shared = min(len(first), len(second))
    different = np.flatnonzero(first[:shared] != second[:shared])
    return int(different[0]) if len(different) else shared


def _folding(template: str) -> str:
    return template if template.startswith(FOLD) else FOLD + template


def _behind_answer(tokenizer: Any) -> tuple[list[int], int]:
    """The tokens that the template writes after an assistant's words, and the index of the first special one."""
    return behind_words(chat_text(lambda chat: render(chat, tokenizer)), tokenizer)
