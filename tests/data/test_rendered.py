"""What goes into a chat template comes out of it, or the record is named with what was left out."""

import contextlib
import random

import pytest

from jlora.data import (
    answer_text,
    encode,
    encode_preferences,
    encode_prompt,
    fold_system,
    marks,
    rendered,
    template_variables,
)
from jlora.errors import UserError

HEAD = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALL = "{% for c in m.get('tool_calls', []) %}<call>{{ c['function']['name'] }} ARGUMENTS</call>{% endfor %}"
TEMPLATES = {
    "plain": HEAD + "{{ m['content'] }}" + TAIL,
    "no roles but two": HEAD.replace("%}<", "%}{% if m['role'] in ('user', 'assistant') %}<")
    + "{{ m['content'] }}"
    + TAIL.replace("{% endfor %}", "{% endif %}{% endfor %}"),
    "cuts": HEAD + "{{ m['content'].split('</think>')[-1] }}" + TAIL,
    "cuts earlier": HEAD + "{% if m['reasoning_content'] and loop.last %}<think>{{ m['reasoning_content'] }}</think>"
    "{% endif %}{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}" + TAIL,
    "calls": "{{ tools | tojson if tools }}" + HEAD + "{{ m['content'] }}" + CALL + TAIL,
    "raises": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + HEAD
    + "{{ m['content'] | trim }}"
    + TAIL,
}
OBJECT = "{{ c['function']['arguments'] | tojson }}"
CONCATENATED = "{{ '' + c['function']['arguments'] }}"
BARE = "{{ c['function']['arguments'] }}"
ITEMS = "{% for k, v in c['function']['arguments'] | items %}{{ k }}={{ v }} {% endfor %}"
NAMES = "{% for k in c['function']['arguments'] %}{{ k }} {% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "get_tide", "parameters": {"type": "object", "properties": {}}}}]
ASK, RESULT = {"role": "user", "content": "How high at nine?"}, {"role": "tool", "content": "4.2"}
SAY = {"role": "assistant", "content": "It is high."}


def calling(arguments, **more):
    function = {"name": "get_tide", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}], **more}


@pytest.fixture
def tokenizer(make_tokenizer):
    return lambda name, arguments=OBJECT: make_tokenizer(TEMPLATES[name].replace("ARGUMENTS", arguments), "<|im_end|>")


def ways(record, tokenizer):
    """Every way of a chat into tokens, each to be called."""
    *prompt, answer = record["messages"]
    variables = {"tools": record["tools"]} if "tools" in record else {}
    pair = record | {"prompt": prompt, "chosen": [answer], "rejected": [{"role": "assistant", "content": "No."}]}
    return {
        "messages": lambda: encode([SFT_RIGHT, record], tokenizer, seq_len=999)[0][-1].tokens,
        "completion": lambda: (
            encode([{**record, "prompt": prompt, "completion": [answer]}], tokenizer, seq_len=999)[0][0].tokens
        ),
        "pairs": lambda: encode_preferences([pair], tokenizer, seq_len=999)[0][0].documents[0].tokens,
        "prompt": lambda: encode_prompt(prompt, tokenizer, variables),
    }


SFT_RIGHT = {"messages": [ASK, SAY]}


@pytest.mark.parametrize("name", ["plain", "no roles but two"])
def test_calls_and_tools_that_no_token_holds_are_named(tokenizer, name):
    record = {"messages": [ASK, calling({"harbour": "Brest", "hour": 9}), RESULT, SAY]}
    for way in ways(record, tokenizer(name)).values():
        with pytest.raises(UserError) as error:
            way()
        found = str(error.value)
        assert "leaves out messages[1].tool_calls[0].function.name ('get_tide'), messages[1].tool_calls[0]" in found
        assert (
            "arguments['harbour'] ('harbour'), messages[1].tool_calls[0].function.arguments['harbour'] ('Brest')"
            in found
        )
        assert "calls need a model whose template writes them" in found
    with pytest.raises(UserError, match=r"record 2: the chat template leaves out messages\[1\]"):
        ways(record, tokenizer(name))["messages"]()
    with pytest.raises(UserError, match=r"leaves out tools\[0\].function.name \('get_tide'\); tools need"):
        encode([SFT_RIGHT | {"tools": TOOLS}], tokenizer(name), seq_len=99)


def test_records_that_lose_the_same_are_named_together(tokenizer):
    records = [{"messages": [ASK, calling({"harbour": f"town{index}"}), RESULT, SAY]} for index in range(9)]
    with pytest.raises(UserError) as error:
        encode(records, tokenizer("plain"), seq_len=99)
    assert len(str(error.value).splitlines()) == 5
    assert "and 6 more of this kind" in str(error.value)


def test_results_users_and_numbers_that_are_left_out_are_named(tokenizer, make_tokenizer):
    chats = [
        [ASK, {**SAY, "content": "Wait."}, {**RESULT, "content": "four metres"}, SAY],
        [ASK, {**ASK, "content": "b"}, SAY],
    ]
    last = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' or loop.nextitem is defined and loop.nextitem.role == "
        "'assistant' and m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
        "<|im_end|>",
    )
    with pytest.raises(UserError, match=r"messages\[2\].content \('four metres'\); the words of the role tool need"):
        encode([{"messages": chats[0]}], last, seq_len=99)
    with pytest.raises(UserError, match=r"messages\[0\].content \('How high at nine\?'\); the words of the role user"):
        encode([{"messages": chats[1]}], last, seq_len=99)
    lost = {"messages": [ASK, calling({"hour": 9, "sure": True})]}
    with pytest.raises(UserError, match=r"arguments\['hour'\] \('9'\), messages\[1\].*\['sure'\] \('true'\)"):
        encode([lost], tokenizer("calls", NAMES), seq_len=99)


def test_reasoning_that_is_cut_is_named_where_it_is_to_be_learned(tokenizer):
    thought = {"role": "assistant", "content": "<think>Six sevens.</think>42"}
    with pytest.raises(
        UserError, match=r"leaves out messages\[1\].content \('Six sevens.'\); reasoning needs a template"
    ):
        encode([{"messages": [ASK, thought]}], tokenizer("cuts"), seq_len=99)
    with pytest.raises(UserError, match=r"messages\[1\].reasoning_content \('Hm.'\)"):
        encode([{"messages": [ASK, {**SAY, "reasoning_content": "Hm."}]}], tokenizer("plain"), seq_len=99)
    # Not learned: earlier turns of a prompt, and a turn that says so.
    encode_prompt([ASK, thought, ASK], tokenizer("cuts"))
    for untrained in (thought, {**SAY, "reasoning_content": "Hm."}):
        name = "cuts" if untrained is thought else "plain"
        encode([{"messages": [ASK, {**untrained, "train": False}, ASK, SAY]}], tokenizer(name), seq_len=199)


@pytest.mark.parametrize("thoughts", [{"content": "<think>Hm.</think>Yes."}, {"reasoning_content": "Hm."}])
def test_reasoning_that_only_the_last_turn_shows_is_left_out_of_earlier_ones_and_that_is_said(tokenizer, thoughts):
    records = [{"messages": [ASK, SAY | thoughts, ASK, SAY | thoughts]}] * 5 + [{"messages": [ASK, SAY | thoughts]}]
    examples, report = encode(records, tokenizer("cuts earlier"), seq_len=199)
    assert len(examples) == 6
    [note] = report.notes
    assert note.startswith("5 records (1, 2, 3, …): the chat template drops text that it writes while the chat ends")


@pytest.mark.parametrize("arguments", [OBJECT, CONCATENATED, BARE, ITEMS])
def test_arguments_as_text_and_as_an_object_give_the_same_tokens(tokenizer, arguments):
    made = tokenizer("calls", arguments)
    given = {"harbour": "Brest é", "hour": 9, "deep": {"a": [1, "b"]}}
    text = '{"harbour":"Brest \\u00e9", "hour": 9,\n "deep": {"a": [1, "b"]}}'
    records = [{"messages": [ASK, calling(one), RESULT, SAY], "tools": TOOLS} for one in (given, text)]
    for first, second in zip(*(ways(record, made).values() for record in records), strict=True):
        assert list(first()) == list(second())
    if arguments != ITEMS:
        assert '{"harbour": "Brest é", "hour": 9, "deep": {"a": [1, "b"]}}' in made.decode(first())
    assert records[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == text  # nobody's record is changed


def test_whatever_a_template_or_tokenizer_raises_names_its_record(tokenizer):
    record = {"messages": [ASK, calling("Brest, nine")]}
    with pytest.raises(UserError, match=r"record 2: the chat template refuses the roles user, assistant: TypeError"):
        encode([SFT_RIGHT, record], tokenizer("calls", ITEMS), seq_len=99)
    half = {"messages": [{"role": "user", "content": "What is this? \ud83d"}, SAY]}
    for wrong in (half, {"prompt": "What is this? \ud83d", "completion": "Half a picture."}):
        with pytest.raises(UserError, match=r"record 2: the tokenizer cannot read the text: .*lone surrogate"):
            encode([SFT_RIGHT, wrong], tokenizer("plain"), seq_len=99)
    with pytest.raises(UserError, match="lone surrogate"):
        encode_prompt(half["messages"][:1], tokenizer("plain"))


def test_what_is_not_a_message_is_named(tokenizer):
    for wrong in ({"content": "hello"}, {"role": None, "content": "hello"}):
        with pytest.raises(UserError, match=r'messages\[1\]: found .*, expected an object with "role" and "content"'):
            encode_prompt([ASK, wrong], tokenizer("plain"))


def test_folding_is_proposed_where_the_system_text_is_at_fault(tokenizer):
    wrong = {"messages": [{"role": "system", "content": "Be brief."}, ASK, calling("Brest, nine")]}
    with pytest.raises(UserError) as error:
        encode([wrong], tokenizer("calls", ITEMS), seq_len=99)
    assert "fold" not in str(error.value)


@pytest.mark.parametrize("name", ["raises", "no roles but two"])
def test_a_system_text_that_a_template_does_not_write_can_be_folded_into_the_first_turn(tokenizer, name):
    made = tokenizer(name)
    system = {"role": "system", "content": "Be brief."}
    for way in ways({"messages": [system, ASK, SAY]}, made).values():
        with pytest.raises(UserError, match=r'data.system="fold" \(--fold_system\) puts the system text'):
            way()
    folded = {**ASK, "content": "Be brief.\n\nHow high at nine?"}
    expected = [list(way()) for way in ways({"messages": [folded, SAY]}, made).values()]
    fold_system(made)
    fold_system(made)  # once is enough
    assert [list(way()) for way in ways({"messages": [system, ASK, SAY]}, made).values()] == expected
    assert [list(way()) for way in ways({"messages": [folded, SAY]}, made).values()] == expected


def test_no_tools_are_no_tools(make_tokenizer):
    made = make_tokenizer(
        "{% if tools is defined and tools is not none %}Tools!{% endif %}" + TEMPLATES["plain"], "<|im_end|>"
    )
    for record in (SFT_RIGHT, SFT_RIGHT | {"tools": []}):
        tokens = encode([record], made, seq_len=99)[0][0].tokens.tolist()
        assert tokens == encode([SFT_RIGHT], made, seq_len=99)[0][0].tokens.tolist()
        assert encode_prompt([ASK], made, template_variables(record)) == encode_prompt([ASK], made)


def test_templates_that_want_another_spelling_get_it(make_tokenizer):
    thinking = make_tokenizer(HEAD + "{{ m['thinking'] }}{{ m['content'] }}" + TAIL, "<|im_end|>")
    [example], _ = encode([{"messages": [ASK, {**SAY, "reasoning": "Hm."}]}], thinking, seq_len=99)
    assert "Hm.It is high." in thinking.decode(example.tokens)
    called = calling({"hour": 9})
    del called["content"]
    strict = make_tokenizer(HEAD + "{{ '' + m['content'] }}" + CALL.replace("ARGUMENTS", OBJECT) + TAIL, "<|im_end|>")
    [example], _ = encode([{"messages": [ASK, called]}], strict, seq_len=99)
    assert '<call>get_tide {"hour": 9}</call>' in strict.decode(example.tokens)
    parts = make_tokenizer(HEAD + "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}" + TAIL, "<|im_end|>")
    [example], _ = encode([SFT_RIGHT], parts, seq_len=99)
    assert parts.decode(example.tokens[example.trained]) == "It is high.<|im_end|>"


def test_texts_that_hold_marks_themselves_or_change_with_them_are_looked_for_instead(make_tokenizer, tokenizer):
    own = {"messages": [ASK, {**SAY, "content": "A \U000f0000 of mine."}]}
    [example], _ = encode([own], tokenizer("plain"), seq_len=99)
    assert tokenizer("plain").decode(example.tokens[example.trained]) == "A \U000f0000 of mine.<|im_end|>"
    counts = make_tokenizer(
        HEAD + "{{ m['content'] | length }}{% if m['role'] != 'tool' %}{{ m['content'] }}{% endif %}" + TAIL,
        "<|im_end|>",
    )
    [example], _ = encode([SFT_RIGHT], counts, seq_len=99)
    assert counts.decode(example.tokens[example.trained]) == "11It is high.<|im_end|>"
    with pytest.raises(UserError, match=r"messages\[1\].content \('twenty'\)"):
        encode([{"messages": [ASK, {**RESULT, "content": "twenty"}, SAY]}], counts, seq_len=99)


def test_chats_of_more_words_than_marks_bear_one_on_some(tokenizer, monkeypatch):
    monkeypatch.setattr(marks, "MOST", 20)
    record = {"messages": [{**ASK, "content": "why " * 100}, {**SAY, "content": "so " * 50}, ASK, SAY]}
    [example], _ = encode([record], tokenizer("plain"), seq_len=999)
    assert tokenizer("plain").decode(example.tokens[example.trained]) == "so " * 50 + "<|im_end|>It is high.<|im_end|>"


def test_an_answer_that_calls_is_the_call_as_the_template_writes_it(tokenizer):
    made = tokenizer("calls")
    assert (
        answer_text({"messages": [ASK, calling('{"hour": 9}')], "tools": TOOLS}, made)
        == '<call>get_tide {"hour": 9}</call>'
    )
    both = [ASK, calling({"hour": 9}, content="I look."), RESULT]
    assert answer_text({"messages": both}, made) == 'I look.<call>get_tide {"hour": 9}</call>'
    assert answer_text(SFT_RIGHT, made) == "It is high."
    assert answer_text({"prompt": [ASK], "completion": [calling({})]}, made) == "<call>get_tide {}</call>"
    assert answer_text({"prompt": "a", "completion": "b"}, made) == "b"


def test_junk_in_the_place_of_calls_tools_and_words_is_trained_or_named(tokenizer):
    choices = random.Random(0)

    def junk(depth=0):
        plain = [None, 3, 1.5, float("nan"), True, "", "a b", "{}", "[1", "\ud800", "\U000f0001", "</think>"]
        names = ["function", "name", "arguments", "type", "text", "tide"]
        nested = [junk(depth + 1) for _ in range(choices.randint(0, 3))] if depth < 4 else []
        as_object = {choices.choice(names): value for value in nested}
        return choices.choice([*plain, nested, as_object, as_object, as_object])

    made = [tokenizer("calls", arguments) for arguments in (OBJECT, ITEMS, CONCATENATED)]
    for number in range(60):
        answer = {**calling(junk()), "content": "It is high."}
        changed = choices.choice(["tool_calls", "content", "reasoning_content", None])
        if changed == "tool_calls":
            answer["tool_calls"] = [junk() for _ in range(choices.randint(1, 2))]
        elif changed:
            answer[changed] = junk()
        record = {"messages": [ASK, answer, RESULT, SAY], "tools": [junk()]}
        for way in ways(record, made[number % 3]).values():
            with contextlib.suppress(UserError):
                assert len(way())


def test_words_that_stand_apart_are_not_each_looked_for_in_a_long_text(make_tokenizer, monkeypatch):
    searched = []
    find = rendered._stands_in
    monkeypatch.setattr(rendered, "_stands_in", lambda word, text: searched.append(word) or find(word, text))
    counts = make_tokenizer(HEAD + "{{ m['content'] | length }} {{ m['content'] }}" + TAIL, "<|im_end|>")
    words = " ".join(f"word{number}" for number in range(500))
    encode([{"messages": [ASK, {**SAY, "content": words}]}], counts, seq_len=99999)
    assert 0 < len(searched) < 10
