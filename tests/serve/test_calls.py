"""Calls in texts as templates write them, and as OpenAI's own client finds them in the answers of a server."""

import contextlib
import importlib.util
import itertools
import json
import pathlib
import random
import re

import openai
import pytest
import tokenizers
import transformers
from openai.lib.streaming.chat import ChatCompletionStreamState
from trl.chat_template_utils import add_response_schema

import jlora
from jlora.data.rendered import write
from jlora.data.template import special_tokens
from jlora.serve import Engine, Limits, app
from jlora.serve.calls import Call
from jlora.serve.forced import beginning
from jlora.serve.forms import CallForms

TRL = pathlib.Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
HEAD = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
)
END = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
CALLS = "{% for call in m.tool_calls or [] %}{% set id = call.id %}{% set call = call.function %}"
THINKS = "{% if m.role == 'assistant' and not m.tool_calls %}<think></think>{% endif %}"
TEMPLATES = {
    "hermes": HEAD + CALLS + '\n<tool_call>\n{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}" + END,
    "llama": HEAD
    + CALLS
    + '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}{% endfor %}'
    + END,
    "mistral": HEAD + "{% if m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}{% if call.id | length != 9 %}"
    '{{ raise_exception("ids have nine characters") }}{% endif %}{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}{{ ", " if not loop.last }}{% endfor %}'
    "]{% endif %}" + END,
    "named": HEAD
    + CALLS
    + "[TOOL_CALLS]{{ call.name }}[CALL_ID]{{ id }}[ARGS]{{ call.arguments | tojson }}{% endfor %}"
    + END,
    "own": HEAD.replace("{{ m.content", THINKS + "{{ m.content")
    + CALLS
    + "<call>{{ call | tojson }}</call>{% endfor %}"
    + END,
    "plain": HEAD + CALLS + '{"name":"{{ call.name }}","arguments":{{ call.arguments | tojson }}}\n{% endfor %}' + END,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Gives it.",
            "parameters": {
                "type": "object",
                "properties": {
                    "harbour": {"type": "string", "description": "Where."},
                    "hour": {"type": "integer", "description": "When."},
                },
            },
        },
    }
    for name in ("get_tide", "set_alarm")
]
NAMED = [("get_tide", {"harbour": 'Zürich 🌊 "x" }</tool_call>', "hour": 9}), ("set_alarm", {"hour": 10})]
QUESTION = {"role": "user", "content": "How high is it?"}
# Of the templates that TRL ships, those that write calls; and what each is to be given.
WELL_KNOWN = (
    *("llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl", "qwen3_5_nothink", "qwen3_6"),
    *("gemma4_v5", "diffusion_gemma", "glm4moe", "gptoss", "lfm2_2_5", "nemotron_3_nano"),
)
ONE_CALL = ("llama3_1", "llama3_2", "gptoss")
NONE_OF_ITS_OWN = ("diffusion_gemma", "lfm2_2_5")  # or one that cannot be read from a stream
SPECIAL = (
    *("<|im_end|>", "<|eot_id|>", "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|call|>"),
    *("<|tool_call>", "<tool_call|>", "<|tool_response>", '<|"|>', "<|tool_call_start|>", "<|tool_call_end|>"),
)


def build(template, *special):
    """A tokenizer of bytes, with special tokens after them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<|end|>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", *special])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = template
    return tokenizer


def message(calls, text=""):
    """An assistant's message with calls, as a template gets it."""
    made = [
        {"id": f"12345678{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": text, "tool_calls": made}


def answer_of(tokenizer, forms, calls):
    """What a model writes to make these calls: the rest of the turn, with no special tokens but those of calls."""
    prompt, text = (
        write(chat, tokenizer, {"tools": TOOLS}, ask=ask).text
        for chat, ask in (([QUESTION], True), ([QUESTION, message(calls)], False))
    )
    start = next(place for place, pair in enumerate(zip(prompt + "\0", text, strict=False)) if pair[0] != pair[1])
    hidden = special_tokens(tokenizer) - {*forms.kept}
    tokens = tokenizer(text[start:], add_special_tokens=False)["input_ids"]
    return tokenizer.decode([token for token in tokens if token not in hidden])


def read(reader, text, size=None):
    """(the text, the calls) of an answer that comes in pieces of this size."""
    pieces = [text[place : place + size] for place in range(0, len(text), size)] if size else [text]
    items = [item for piece in pieces for item in reader.add(piece)] + reader.end()
    assert all(items)
    calls = [(item.name, json.loads(item.arguments)) for item in items if isinstance(item, Call)]
    return "".join(item for item in items if isinstance(item, str)), calls


@pytest.fixture(scope="module")
def hermes():
    return CallForms(build(TEMPLATES["hermes"]))


@pytest.mark.parametrize("size", [1, 3, None])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes_for_calls_is_read_as_these_calls(name, size):
    tokenizer = build(TEMPLATES[name], "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<call>")
    forms = CallForms(tokenizer)
    for calls in (NAMED[:1], NAMED):
        text = answer_of(tokenizer, forms, calls)
        assert read(forms.reader(TOOLS), text, size) == ("", calls), text


def well_known(name, *, own=False):
    """A tokenizer with a template that TRL ships; with `own`, with TRL's response template for it as well."""
    tokenizer = build((TRL / f"{name}.jinja").read_text("utf-8"), *SPECIAL)
    return add_response_schema(tokenizer) if own else tokenizer


@pytest.mark.parametrize("size", [1, None])
@pytest.mark.parametrize(
    ("name", "own"), [(name, own) for name in WELL_KNOWN for own in (False, True)[: 2 - (name in NONE_OF_ITS_OWN)]]
)
def test_calls_in_the_templates_of_well_known_models_are_read(name, own, size):
    tokenizer = well_known(name, own=own)
    calls = [("get_tide", {"harbour": "Zürich 🌊", "hour": 9}), *NAMED[1:]]
    forms = CallForms(tokenizer)
    for some in (calls[:1], calls)[: 2 - (name in ONE_CALL)]:
        text, found = read(forms.reader(TOOLS), answer_of(tokenizer, forms, some), size)
        assert found == some and set(text.split()) <= {"<think>", "</think>", "<think></think>"}


def test_gpt_oss_calls_from_any_channel():
    forms = CallForms(well_known("gptoss"))
    for header in (
        "<|channel|>commentary to=functions.get_tide <|constrain|>json",
        " to=functions.get_tide<|channel|>commentary json",
    ):
        text = f'<|channel|>analysis<|message|>I look.<|start|>assistant{header}<|message|>{{"hour": 9}}'
        assert read(forms.reader(TOOLS), text) == ("analysisI look.", [TIDE])


def call(name="get_tide", arguments='{"hour": 9}'):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TIDE = ("get_tide", {"hour": 9})


@pytest.mark.parametrize("size", [1, None])
@pytest.mark.parametrize(
    ("text", "said", "called"),
    [
        (f"I look.\n{call()}\n", "I look.", [TIDE]),
        (f"{call()}\n{call('set_alarm')}", "", [TIDE, ("set_alarm", {"hour": 9})]),
        (f"One. {call()} Two.\n{call()}\n\nThree. ", "One.  Two.\n\n\nThree.", [TIDE, TIDE]),
        (f"\n\n{call()}\n Well.", "Well.", [TIDE]),
        (call().removesuffix("\n</tool_call>"), "", [TIDE]),  # a stop string, or a model that leaves it out
        (f"<tool_call>{call()}", "<tool_call>", [TIDE]),
        (call("rm") + call(), call("rm"), [TIDE]),
        (call(arguments='"{\\"hour\\": 9}"'), "", [TIDE]),  # a JSON text in JSON
        ('{"name": "get_tide", "parameters": {"hour": 9}}\n', "", [TIDE]),
        (
            ' [{"name": "get_tide", "arguments": {"hour": 9}}, {"name": "get_tide", "arguments": {"hour": 9}}]',
            "",
            2 * [TIDE],
        ),
        ('{"name":"get_tide","arguments":{"hour":9}};\n{"name":"get_tide","arguments":{"hour":9}}', "", 2 * [TIDE]),
        ('{"type": "function", "function": {"name": "get_tide", "arguments": {"hour": 9}}}', "", [TIDE]),
    ],
    ids=itertools.count(),
)
def test_calls_are_told_apart_from_text(hermes, text, said, called, size):
    found, calls = read(hermes.reader(TOOLS), text, size)
    assert (found, calls) == (said, called)


@pytest.mark.parametrize("size", [1, 4, None])
@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        " It is 4.2 metres.\n",
        "{",
        '{"height": 4.2}\n',
        "[1] is where `<tool_call>` is explained. <tool",
        "<tool_call>",
        '<tool_call>\n{"name": "get_tide", "arguments": {"hour": 9}',
        call(arguments='{"hour": }'),
        call(arguments='{"hour": "9}'),
        call(arguments="[9]"),
        call(arguments="9"),
        call(arguments='"nine"'),
        call(arguments='{"hour": NaN}'),
        call(arguments='{"hour": 1e999}'),
        call(arguments='{"hour": ' + "9" * 5000 + "}"),
        call(arguments='{"hour": ' + "[" * 20000 + "]" * 20000 + "}"),
        call("get_tides") + "\nDone.\n",
        call("get_tide").replace("name", "title"),
        '<tool_call>{"name": ["get_tide"], "arguments": {}}</tool_call>',
        "<tool_call>[]</tool_call>",
        '{"name": "get_tide", "arguments": {"hour": 9}} is the call that I would make.',
        '{"name": "get_tide", "description": "Gives it.", "parameters": {"type": "object"}}',
    ],
    ids=itertools.count(),
)
def test_nothing_is_lost_of_what_is_no_call(hermes, text, size):
    assert read(hermes.reader(TOOLS), text, size) == (text, [])


def test_text_is_told_at_once_and_marks_never(hermes):
    reader = hermes.reader(TOOLS)
    told = [reader.add(one) for one in f"See: <b>{call()}.\n"]
    assert told[:8] == [["S"], ["e"], ["e"], [":"], [], [], [" <b"], [">"]]
    assert [items for items in told[8:] if items] == [[Call("get_tide", '{"hour": 9}')], ["."]]
    assert told[-3] and told[-2] and not told[-1] and reader.end() == []


@pytest.mark.parametrize("size", [1, None])
def test_calls_in_tags_are_calls_only_if_they_are_complete(size):
    reader = CallForms(well_known("qwen3_6")).reader
    hour = "<parameter=hour>\n9\n</parameter>\n"
    whole = f"<tool_call>\n<function=get_tide>\n{hour}</function>\n</tool_call>"
    code = "  if x < 3:\n    y()\n"
    kept = whole.replace(hour, f"<parameter=harbour>\n{code}\n</parameter>\n")
    assert read(reader(TOOLS), kept, size) == ("", [("get_tide", {"harbour": code})])
    assert read(reader(TOOLS), whole.replace(hour, ""), size) == ("", [("get_tide", {})])
    for cut in (
        whole[:-1],
        whole[:60],
        whole.partition("</function>")[0].rstrip(),
        whole.replace("\n</parameter>", ""),
        whole.replace("get_tide", "rm"),
    ):
        assert read(reader(TOOLS), cut, size) == (cut, [])
        assert read(reader(TOOLS), f"{whole}\n{cut}", size) == (cut, [TIDE])


@pytest.mark.parametrize("name", [*TEMPLATES, *WELL_KNOWN])
def test_it_does_not_matter_in_what_pieces_an_answer_comes(name):
    forms = CallForms(build(TEMPLATES[name]) if name in TEMPLATES else well_known(name))
    parts = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<call>", "</call>", "[ARGS]", "get_tide"]
    parts += [*' \n{}[];,<"9ü', '{"name": "get_tide", "arguments": {"hour": 9}}', '{"name": "rm", "arguments": {}}']
    parts += [
        "<function=get_tide>",
        "<parameter=hour>",
        "</parameter>",
        "</function>",
        "call:get_tide",
        "to=functions.",
    ]
    random_one = random.Random(name)
    for _ in range(100):
        text = "".join(random_one.choices(parts, k=random_one.randint(1, 9)))
        said, calls = read(forms.reader(TOOLS), text)
        assert calls or said == text
        assert read(forms.reader(TOOLS), text, 1) == read(forms.reader(TOOLS), text, 4) == (said, calls)


@pytest.mark.parametrize("close", [{"close": "</call>"}, {"close_pattern": r"</call>"}])
@pytest.mark.parametrize("size", [1, 3, None])
def test_nothing_is_lost_of_what_a_tokenizers_response_template_does_not_read(close, size):
    def call(name, hour):
        return f'<call>{{"name": "{name}", "arguments": {{"hour": {hour}}}}}</call>'

    tokenizer = build(TEMPLATES["hermes"])
    field = {"open": "<call>", **close, "repeats": True, "content": "json"}
    field["transform"] = {"type": "function", "function": "{content}"}
    tokenizer.response_template = {"start_anchor": "<|assistant|>", "fields": {"tool_calls": field, "content": {}}}
    reader = CallForms(tokenizer).reader
    wrong, unknown = call("get_tide", "9h"), call("rm", 9)
    for text, said, called in (
        (f"Now {call('get_tide', 9)}{wrong}{call('get_tide', 9)}", f"Now {wrong}", [TIDE, TIDE]),
        (wrong + unknown + call("get_tide", 9) + unknown + " end", f"{wrong}{unknown}{unknown} end", [TIDE]),
        (wrong[:-4], wrong[:-4], []),
        (f"{call('get_tide', 9)}\n{call('get_tide', 9)}\n", "", [TIDE, TIDE]),
        (f"<think> {call('get_tide', chr(34) + '9' + chr(34))}", "<think>", [TIDE]),  # typed by the schema
        ("It is <b>high</b>.\n", "It is <b>high</b>.\n", []),
    ):
        assert read(reader(TOOLS), text, size) == (said, called), text


# ---------------------------------------------------------------- through a server


class Scripted(Engine):
    """An engine whose answers are the texts that it is given, one after another, whatever its model draws."""

    def __init__(self, *args):
        super().__init__(*args)
        self.script, self.prompts, self._answers = [], [], {}

    def submit(self, request, listener):
        self.prompts.append(self.tokenizer.decode(request.tokens))
        answer = self.tokenizer(self.script.pop(0))["input_ids"]
        begun = request.tokens[len(request.tokens) - request.begun :]
        assert answer[: request.begun] == begun, "what is forced is not what the model would have written"
        self._answers[id(request)] = [*answer[request.begun :], self.tokenizer.eos_token_id]
        return super().submit(request, listener)

    def _tell(self, job, number, drawn, row):
        super()._tell(job, self._answers[id(job.request)][len(job.drawn)], drawn, row)


@pytest.fixture(scope="module")
def engine(make_llama):
    tokenizer = build(TEMPLATES["plain"], "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    folder = make_llama(vocab_size=300, hidden_size=24, intermediate_size=40, num_attention_heads=3)
    engine = Scripted(*jlora.load(folder, dtype="float32"), tokenizer, Limits(rows=2, length=1024, chunk=128))
    engine.start()
    yield engine
    engine.stop(drain=False)


@pytest.fixture
def client(engine, serving):
    """client(template): OpenAI's, of a server whose tokenizer has this template."""
    with contextlib.ExitStack() as stack:

        def client(template):
            engine.tokenizer.chat_template = template
            engine.script.clear()
            service = app.Service(engine, engine.tokenizer, "tiny")
            address = stack.enter_context(serving(app.application(service), engine))
            made = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
            return stack.enter_context(made)

        yield client


def ask(client, messages, **settings):
    settings = {"tools": TOOLS, "model": "tiny"} | settings
    return client.chat.completions.create(messages=messages, **settings)


def streamed(client, messages, **settings):
    """(the whole answer as the client makes it of a stream, the chunks)."""
    state, chunks = ChatCompletionStreamState(), []
    for chunk in ask(client, messages, stream=True, **settings):
        state.handle_chunk(chunk)
        chunks.append(chunk)
    return state.current_completion_snapshot, chunks


def called(answer):
    return [(one.function.name, json.loads(one.function.arguments)) for one in answer.tool_calls or []]


@pytest.mark.parametrize("name", TEMPLATES)
def test_openais_client_gets_calls_and_sends_them_back_with_their_results(engine, client, name):
    made = client(TEMPLATES[name])
    forms = CallForms(engine.tokenizer)
    text = answer_of(engine.tokenizer, forms, NAMED)
    before = "" if name in ("llama", "plain") else "I look it up.\n"
    engine.script += [before + text] * 2 + ["It is 4.2 metres."]
    whole = ask(made, [QUESTION])
    stream, chunks = streamed(made, [QUESTION])
    for answer in (whole, stream):
        (choice,) = answer.choices
        assert called(choice.message) == NAMED and choice.finish_reason == "tool_calls"
        assert choice.message.content == (before.rstrip() or None)
        assert {one.type for one in choice.message.tool_calls} == {"function"}
        assert len({one.id for one in choice.message.tool_calls}) == 2
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(delta.index, delta.function.name) for delta in deltas] == [(0, "get_tide"), (1, "set_alarm")]
    assert all("Zürich" in one.function.arguments for one in deltas[:1])
    results = [
        {"role": "tool", "tool_call_id": one.id, "content": f"result {place}"}
        for place, one in enumerate(whole.choices[0].message.tool_calls)
    ]
    last = ask(made, [QUESTION, whole.choices[0].message, *results]).choices[0]
    assert (last.message.content, last.message.tool_calls) == ("It is 4.2 metres.", None)
    assert last.finish_reason == "stop"
    _, _, turn = engine.prompts[-1].rpartition(QUESTION["content"])
    expected = answer_of(engine.tokenizer, forms, NAMED)
    for index, one in enumerate(whole.choices[0].message.tool_calls):
        expected = expected.replace(f"12345678{index}", one.id)
    assert expected in turn
    assert "result 0" in turn and "result 1" in turn and turn.count("4.2") == 0


def test_what_is_no_call_reaches_openais_client_as_text(engine, client):
    made = client(TEMPLATES["mistral"])
    for text, said in (
        ('[TOOL_CALLS] [{"name": "rm", "arguments": {}}]', ' [{"name": "rm", "arguments": {}}]'),
        ("It is 4.2 metres, ﬂood.\n", "It is 4.2 metres, ﬂood.\n"),
    ):
        engine.script += [text] * 2
        for answer in (ask(made, [QUESTION]), streamed(made, [QUESTION])[0]):
            assert answer.choices[0].message.content == said and not answer.choices[0].message.tool_calls
            assert answer.choices[0].finish_reason == "stop"


def test_calls_are_text_for_whoever_gave_no_tools_or_wants_none_called(engine, client):
    made = client(TEMPLATES["hermes"])
    text = call()
    for settings in ({"tools": openai.omit}, {"tools": []}, {"tool_choice": "none"}):
        engine.script += [text] * 2
        for answer in (ask(made, [QUESTION], **settings), streamed(made, [QUESTION], **settings)[0]):
            assert answer.choices[0].message.content == text and not answer.choices[0].message.tool_calls


def only(name):
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("choice", "begun"), [("required", '"name": "'), (only("get_tide"), 'get_tide", "arguments":')]
)
def test_a_call_that_is_asked_for_is_begun_and_counts_as_the_models_own(engine, client, choice, begun):
    made = client(TEMPLATES["hermes"])
    text = answer_of(engine.tokenizer, CallForms(engine.tokenizer), NAMED[:1])
    engine.script += [text] * 3
    free = ask(made, [QUESTION])
    whole = ask(made, [QUESTION], tool_choice=choice)
    stream, chunks = streamed(made, [QUESTION], tool_choice=choice, stream_options={"include_usage": True})
    for answer in (whole, stream):
        (found,) = answer.choices
        assert called(found.message) == NAMED[:1] and found.finish_reason == "tool_calls"
        assert found.message.content is None
    first, *others = engine.prompts[-3:]
    assert all(begun in prompt.removeprefix(first) for prompt in others)
    used = [(usage.prompt_tokens, usage.completion_tokens) for usage in (free.usage, whole.usage, chunks[-1].usage)]
    assert used == [(len(engine.tokenizer(first)["input_ids"]), len(engine.tokenizer(text)["input_ids"]) + 1)] * 3


@pytest.mark.parametrize("name", [*TEMPLATES, *WELL_KNOWN])
def test_what_a_call_begins_with_is_what_the_template_writes_without_thoughts(name):
    tokenizer = build(TEMPLATES[name], "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]") if name in TEMPLATES else well_known(name)
    forms, variables = CallForms(tokenizer), {"tools": TOOLS}
    wholes = [
        write([QUESTION, message([one])], tokenizer, variables).text
        for one in (*NAMED, ("get_tide", {"hour": 9}), ("set_alarm", {}))
    ]
    both, one = (beginning(forms, tokenizer, [QUESTION], variables, tools) for tools in (TOOLS, TOOLS[:1]))
    assert both.prompt == one.prompt and both.call == one.call[: len(both.call)]
    assert all(text.startswith(tokenizer.decode(both.prompt + both.call)) for text in wholes)
    begun = [text.startswith(tokenizer.decode(one.prompt + one.call)) for text in wholes]
    assert begun == [True, False, True, False]
    assert tokenizer.decode(one.call).count("get_tide") == 1 and "think" not in tokenizer.decode(one.call)


def test_a_call_that_is_asked_for_and_not_finished_stays_text(engine, client):
    made = client(TEMPLATES["hermes"])
    start = '<tool_call>\n{"name": "get_tide", "arguments": {'
    for text in (start, start + "9}}\n</tool_call>"):
        engine.script += [text]
        (found,) = ask(made, [QUESTION], tool_choice=only("get_tide")).choices
        assert found.message.content == text and not found.message.tool_calls and found.finish_reason == "stop"
    engine.script += [call()]
    (found,) = ask(made, [QUESTION], tool_choice=only("get_tide"), max_tokens=len(start) + 2, logprobs=True).choices
    assert (found.message.content, found.finish_reason) == (call()[: len(start) + 2], "length")
    assert len(found.logprobs.content) == 2, "only what is drawn has a likelihood"


def test_only_the_named_function_may_be_called(engine, client):
    made = client(TEMPLATES["hermes"])
    engine.script += [call() + call("set_alarm")]
    (found,) = ask(made, [QUESTION], tool_choice=only("get_tide")).choices
    assert called(found.message) == [TIDE] and found.message.content == call("set_alarm")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tool_choice": only("rm")}, "tool_choice: found 'rm', expected the name of one of the tools"),
        ({"tool_choice": "required", "tools": []}, "tool_choice: found 'required', expected tools with it"),
        ({"tool_choice": "any"}, r'tool_choice: found "any", expected "auto", "none", "required" or {'),
        ({"tool_choice": {"type": "function", "function": {"name": 1}}}, "tool_choice: found an object, expected"),
        ({"tool_choice": "required", "max_tokens": 5}, "max_tokens=5: expected more than 22, the tokens that a call"),
    ],
)
def test_a_choice_of_tools_that_cannot_be_made_is_refused(engine, client, settings, told):
    with pytest.raises(openai.BadRequestError, match=re.escape(told) if "{" not in told else told):
        ask(client(TEMPLATES["hermes"]), [QUESTION], **settings)


def test_no_call_is_asked_for_in_a_form_that_is_not_known(engine, client):
    template = HEAD + CALLS + "CALL {{ call.name }} WITH {{ call.arguments | tojson }}{% endfor %}" + END
    with pytest.raises(openai.BadRequestError, match="the chat template writes calls in a form in which none can be"):
        ask(client(template), [QUESTION], tool_choice="required")


def test_an_answer_that_is_cut_short_says_so_with_the_calls_that_it_has(engine, client):
    made = client(TEMPLATES["hermes"])
    text = call() + call("set_alarm")
    engine.script += [text] * 4
    settings = dict(max_completion_tokens=len(text) - 20, logprobs=True, n=2)
    whole, (stream, chunks) = ask(made, [QUESTION], **settings), streamed(made, [QUESTION], **settings)
    for answer in (whole, stream):
        for choice in answer.choices:
            assert called(choice.message) == [TIDE] and choice.finish_reason == "length"
            assert choice.message.content == call("set_alarm")[:-20]
            assert len(choice.logprobs.content) == len(text) - 20
    assert len({one.id for choice in whole.choices for one in choice.message.tool_calls}) == 2
    assert chunks[-1].choices[0].finish_reason == "length"
