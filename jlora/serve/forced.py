"""What an answer that has to be a call begins with. Nothing else is forced: the model goes on from there."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jlora.data.rendered import write
from jlora.data.template import common_prefix, rendered_tokens
from jlora.errors import UserError
from jlora.serve.calls import Call, Tool
from jlora.serve.forms import CallForms, names_of
from jlora.serve.slots import common
from jlora.serve.words import Words

# Two calls that have only the function's name in common. Mistral's templates take only ids of nine characters.
_CALLS = (("123456789", {}), ("abcdefghi", {"text": "jlora_value"}))
_THOUGHT = "</think>"


class Beginning(NamedTuple):
    """The tokens of a prompt that asks for a call, and those that the call begins with.

    The prompt has all that the template writes before a call, such as reasoning, which is empty.
    """

    prompt: list[int]
    call: list[int]


def beginning(
    forms: CallForms, tokenizer: Any, messages: Sequence[Any], variables: Mapping[str, Any], tools: Sequence[Tool]
) -> Beginning:
    """What all calls of these tools begin with, as the chat template writes them after these messages.

    For one tool, these are the marks, its name and all else that comes before its arguments.

    Args:
        variables: what else the template is given.

    Raises:
        UserError: the calls share no beginning, or a call with that beginning would not be recognised.
    """
    asked = write(messages, tokenizer, variables, ask=True).text
    prompts, calls = [], []
    for name in {min(names_of(tools)), max(names_of(tools))}:  # what these begin with, all between them do as well
        for number, arguments in _CALLS:
            function = {"name": name, "arguments": arguments}
            answer = {"content": "", "tool_calls": [{"id": number, "type": "function", "function": function}]}
            text = write([*messages, {"role": "assistant", **answer}], tokenizer, variables).text
            place = _place(asked, text)
            prompts.append(text[:place])
            calls.append(rendered_tokens(text[place:], tokenizer))
            if arguments and not _is_read(calls[-1].tolist(), name, forms, tokenizer, tools):
                raise _refusal("writes calls in a form in which none can be begun")
    shared = calls[0][: min(common_prefix(calls[0], call) for call in calls)]
    if len({*prompts}) > 1 or not len(shared):
        raise _refusal("writes nothing that all calls begin with")
    return Beginning(rendered_tokens(prompts[0], tokenizer).tolist(), shared.tolist())


def _place(asked: str, text: str) -> int:
    """Where the call begins in `text`: where it first differs from the prompt, but after any empty reasoning."""
    start = common(asked, text)
    thought = text.rfind(_THOUGHT, start)
    if thought < 0:
        return start
    end = thought + len(_THOUGHT)
    return end + len(text[end:]) - len(text[end:].lstrip())


def _refusal(why: str) -> UserError:
    return UserError(f'tool_choice: the chat template {why}; leave tool_choice out, or say "auto"')


def _is_read(tokens: Sequence[int], name: str, forms: CallForms, tokenizer: Any, tools: Sequence[Tool]) -> bool:
    """Whether an answer of these tokens is a call of this function, and nothing else."""
    reader = forms.reader(tools)
    items = [*reader.add(Words(tokenizer, kept=forms.kept, begun=tokens).end()), *reader.end()]
    return len(items) == 1 and isinstance(items[0], Call) and items[0].name == name
