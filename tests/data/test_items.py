"""Items: TRL's tokens for pairs and single answers, and batches in which every document is once and knows its item."""

import json
import types

import datasets
import numpy as np
import pytest
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

from jlora.data import (
    Example,
    Item,
    Step,
    collate,
    collate_items,
    count_tokens,
    describe,
    encode_preferences,
    loader,
    plan,
    plan_items,
    template_tail,
    with_mismatched,
)
from jlora.errors import UserError
from jlora.types import BRANCH

TEXTS = [("2+2=", "4", "5"), ("Sky?", " blue", " blue-green"), ("", "yes", "no"), ("p", "x" * 30, "y<|end|>")]


def text_pairs():
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in TEXTS]


def chat_pairs():
    def says(role, text):
        return [{"role": role, "content": text}]

    pairs = [
        {"prompt": says("user", p), "chosen": says("assistant", c), "rejected": says("assistant", r)}
        for p, c, r in TEXTS
    ]
    pairs[1]["prompt"] = says("system", "Be kind.") + pairs[1]["prompt"]
    pairs[1]["chosen"] += says("user", "More!") + says("assistant", "No.")
    return pairs


def trl_rows(trainer, collator, records, tokenizer, **settings):
    """What the trainer's preparation and collation make of the records: (tokens, trained) of every row."""
    arguments = types.SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start", per_device_train_batch_size=1
    )
    vars(arguments).update(settings)
    this = types.SimpleNamespace(_tokenizer=tokenizer, calculate_KL=settings.get("kl", False))
    prepared = trainer._prepare_dataset(this, datasets.Dataset.from_list(records), tokenizer, arguments, "test")
    batch = collator(pad_token_id=0, max_length=arguments.max_length)(list(prepared))
    rows = []
    for prefix in ("", "KL_")[: 1 + this.calculate_KL]:
        arrays = (batch[prefix + name].numpy() for name in ("input_ids", "attention_mask", "completion_mask"))
        rows += [(tokens[real == 1], trained[real == 1] == 1) for tokens, real, trained in zip(*arrays, strict=True)]
    return rows


def assert_same(documents, rows):
    for document, (tokens, trained) in zip(documents, rows, strict=True):
        np.testing.assert_array_equal(document.tokens, tokens)
        np.testing.assert_array_equal(document.trained, trained)


def sides(items):
    return [document for side in zip(*(item.documents for item in items), strict=True) for document in side]


@pytest.mark.parametrize("seq_len", [None, 60])
@pytest.mark.parametrize("make", [text_pairs, chat_pairs])
def test_pairs_have_the_tokens_of_trls_dpo(tokenizer, make, seq_len):
    rows = trl_rows(DPOTrainer, DataCollatorForPreference, make(), tokenizer, max_length=seq_len)
    items, report = encode_preferences(make(), tokenizer, seq_len=seq_len or 999, overlong="cut")
    assert_same(sides(items), rows)
    assert report.examples == len(items) == len(rows) // 2
    assert report.tokens == sum(len(tokens) for tokens, _ in rows)


@pytest.mark.parametrize("make", [text_pairs, chat_pairs])
def test_pairs_have_the_tokens_of_trls_dpo_with_another_template(byte_tokenizer, make):
    rows = trl_rows(DPOTrainer, DataCollatorForPreference, make(), byte_tokenizer)
    items, _ = encode_preferences(make(), byte_tokenizer, seq_len=999)
    assert_same(sides(items), rows)


@pytest.mark.parametrize("make", [text_pairs, chat_pairs])
def test_single_answers_and_mismatched_ones_are_those_of_trls_kto(tokenizer, make):
    records = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for pair in make()
    ][:7]
    rows = trl_rows(
        KTOTrainer, DataCollatorForUnpairedPreference, records, tokenizer, kl=True, per_device_train_batch_size=3
    )
    items, _ = encode_preferences(records, tokenizer, "unpaired", seq_len=999)
    assert [item.values for item in items] == [{"label": 1.0}] * 4 + [{"label": 0.0}] * 3
    assert_same(sides(with_mismatched(items, 3, seq_len=999)), rows)


def test_a_mismatched_answer_is_cut_and_needs_another_item(byte_tokenizer):
    records = [{"prompt": "abc", "completion": "d", "label": True}, {"prompt": "e", "completion": "fg", "label": False}]
    items, _ = encode_preferences(records, byte_tokenizer, "unpaired", seq_len=5)
    found = [item.documents[1] for item in with_mismatched(items, 2, seq_len=5)]
    assert [byte_tokenizer.decode(document.tokens) for document in found] == ["abcfg", "ed<|end|>"]
    assert [document.trained.tolist() for document in found] == [[False] * 3 + [True] * 2, [False] + [True] * 2]
    with pytest.raises(ValueError, match="found batch_size=1, expected 2 or more"):
        with_mismatched(items, 1, seq_len=5)
    with pytest.raises(ValueError, match=r"found items of \[2\] documents"):
        list(with_mismatched(with_mismatched(items, 2, seq_len=5), 2, seq_len=5))


def test_what_a_template_writes_behind_an_answer_is_the_end_of_its_document(tokenizer, byte_tokenizer, text_tokenizer):
    [item], _ = encode_preferences(chat_pairs()[:1], tokenizer, seq_len=99)
    tail = template_tail(tokenizer)
    assert tokenizer.decode(tail) == "\n"
    for document in item.documents:
        assert document.tokens[-len(tail) - 1 :].tolist() == [tokenizer.eos_token_id, *tail]
    assert template_tail(byte_tokenizer) == template_tail(text_tokenizer) == []


def test_numbers_of_a_record_become_values(byte_tokenizer):
    numbers = {"margin": 2, "ref_chosen_logps": -1.5, "ref_rejected_logps": -3}
    [item], _ = encode_preferences([{**text_pairs()[0], **numbers, "id": 4}], byte_tokenizer, seq_len=99)
    assert item.values == numbers


def test_tools_and_settings_reach_the_chat_template(make_tokenizer):
    tokenizer = make_tokenizer(
        "{{ tools | tojson if tools }}{{ mood }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        "<|im_end|>",
    )
    pair = chat_pairs()[0] | {"tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "glad"}}
    [item], _ = encode_preferences([pair], tokenizer, seq_len=99)
    assert tokenizer.decode(item.documents[0].tokens) == '[{"name": "f"}]glad2+2=<|im_end|>4<|im_end|>'
    assert_same(item.documents, trl_rows(DPOTrainer, DataCollatorForPreference, [pair], tokenizer))


def test_both_answers_begin_where_the_first_of_them_leaves_the_prompt(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}",
        "<|im_end|>",
    )
    pair = chat_pairs()[0] | {"chosen": [{"role": "assistant", "content": "<thin air"}]}
    [item], _ = encode_preferences([pair], tokenizer, seq_len=99)
    assert [tokenizer.decode(d.tokens[d.trained]) for d in item.documents] == ["<thin air<|im_end|>", "5<|im_end|>"]
    assert_same(item.documents, trl_rows(DPOTrainer, DataCollatorForPreference, [pair], tokenizer))


def test_a_prompt_that_reads_otherwise_before_an_answer_is_no_part_of_the_answer(make_tokenizer):
    """As Mistral's template has it: a system text stands before the question that comes last, and nowhere else."""
    template = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(template, "</s>")
    prompt = [{"role": "system", "content": "Short."}, {"role": "user", "content": "a?"}]
    answers = [[{"role": "assistant", "content": answer}] for answer in ("Yes.", "No.")]
    [item], _ = encode_preferences(
        [{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}], tokenizer, seq_len=99
    )
    texts = [tokenizer.decode(document.tokens[document.trained]) for document in item.documents]
    assert texts == ["Yes.</s>", "No.</s>"]


def test_a_pair_is_cut_dropped_or_refused_as_a_whole(byte_tokenizer):
    pairs = [("p", "a", "b"), ("p", "a", "b" * 9), ("pqrst", "a", "b"), ("p", "aaaaab", "aaaaac")]
    records = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    items, report = encode_preferences(records, byte_tokenizer, seq_len=5, overlong="drop")
    assert (len(items), report.examples, report.dropped, report.cut, report.untrained) == (1, 1, 3, 0, 0)
    items, report = encode_preferences(records, byte_tokenizer, seq_len=5, overlong="cut")
    assert [[len(d.tokens) for d in item.documents] for item in items] == [[3, 3], [3, 5]]
    # The third has no room for an answer, and the answers of the fourth part behind the cut.
    assert (report.examples, report.dropped, report.cut, report.untrained) == (2, 0, 1, 2)
    assert (report.tokens, report.trained_tokens) == (14, 10)
    steps = plan_items(items, seq_len=5, batch_size=1, packing=False, bucket=1, epochs=1)
    assert describe(report, steps) == (
        "14 tokens of which 10 are trained; 2 steps, rows of 3, 5 tokens; 1 cut at seq_len; 2 without a trained token"
    )
    with pytest.raises(ValueError) as error:
        encode_preferences(records, byte_tokenizer, seq_len=5, overlong="error")
    for words in ("record 2: found 11 tokens, expected at most 5", "record 3: found 7", "record 4: found 8"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="no token to train on in 4 records: 4 longer than 2 tokens"):
        encode_preferences(records, byte_tokenizer, seq_len=2)


def test_answers_of_the_same_tokens_and_chats_without_a_template_are_refused(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content | trim }}<|im_end|>{% endfor %}", "<|im_end|>")
    good, bad = chat_pairs()[:2]
    bad["chosen"], bad["rejected"] = ([{"role": "assistant", "content": text}] for text in ("a", "a "))
    with pytest.raises(ValueError, match="record 2: found the same tokens for chosen and rejected"):
        encode_preferences([good, bad], tokenizer, seq_len=99)
    with pytest.raises(ValueError, match="1 of 2 records are chats, but the tokenizer has no chat template"):
        encode_preferences([text_pairs()[0], good], make_tokenizer(None, "<|im_end|>"), seq_len=99)


def item(*documents, **values):
    examples = [Example(np.array(d, np.int32), np.arange(len(d)) >= 1) for d in documents]
    return Item(tuple(examples), values)


THREE = [item([1, 2], [3, 4, 5], margin=0.5), item([6, 7, 8], [9, 1], margin=2.0), item([2, 3], [4, 5], margin=3.0)]


def test_a_batch_of_pairs_in_rows_of_their_own_drawn_out():
    [step] = plan_items(THREE, seq_len=4, batch_size=2, grad_accum=2, packing=False, bucket=1, epochs=1, shuffle=False)
    batch = collate_items(THREE, step, 2)
    assert batch["tokens"].tolist() == [
        [[1, 2, 0], [6, 7, 8], [3, 4, 5], [9, 1, 0]],
        [[2, 3, 0], [0, 0, 0], [4, 5, 0], [0, 0, 0]],
    ]
    assert batch["documents"].tolist() == [
        [[0, 0, 4], [1, 1, 1], [2, 2, 2], [3, 3, 4]],
        [[0, 0, 4], [4, 4, 4], [2, 2, 4], [4, 4, 4]],
    ]
    assert batch["weights"].tolist()[0] == [[1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert batch["items"].tolist() == [[1, 1], [1, 0]]
    assert batch["margin"].tolist() == [[0.5, 2.0], [3.0, 0.0]]
    kinds = {name: (array.dtype.name, array.ndim) for name, array in batch.items()}
    assert kinds["documents"] == ("int32", 3)
    assert kinds["items"] == kinds["margin"] == ("float32", 2)


def test_a_packed_batch_of_pairs_drawn_out():
    [step] = plan_items(THREE, seq_len=5, batch_size=2, packing=True, bucket=1, epochs=1, shuffle=False)
    batch = collate_items(THREE, step)
    # The two items of five tokens fill a row; three items take four places.
    assert batch["tokens"].tolist() == [[[1, 2, 3, 4, 5, 6, 7, 8, 9, 1], [2, 3, 4, 5, 0, 0, 0, 0, 0, 0]]]
    assert batch["segment_ids"].tolist() == [[[1, 1, 2, 2, 2, 3, 3, 3, 4, 4], [1, 1, 2, 2, 0, 0, 0, 0, 0, 0]]]
    assert batch["documents"].tolist() == [[[0, 0, 4, 4, 4, 1, 1, 1, 5, 5], [2, 2, 6, 6, 8, 8, 8, 8, 8, 8]]]
    assert batch["items"].tolist() == [[1, 1, 1, 0]]
    assert batch["margin"].tolist() == [[0.5, 2.0, 3.0, 0.0]]


def begun(start, *answers, **values):
    """An item whose documents begin alike."""
    documents = tuple(
        Example(np.array([*start, *answer], np.int32), np.arange(len(start) + len(answer)) >= len(start))
        for answer in answers
    )
    return Item(documents, values)


def test_what_documents_begin_with_stands_in_a_row_once_drawn_out():
    items = [begun([1, 2, 3], [4, 5], [6], margin=0.5), begun([7], [8], [9, 9], margin=1.0)]
    [step] = plan_items(items, seq_len=6, batch_size=2, packing=False, bucket=1, epochs=1, shuffle=False, share=True)
    assert step == Step(((0, 1), (2, 3)), 7, ((2,), (2,)))
    batch = collate_items(items, step)
    # The last token of a prompt is each answer's own, for it predicts the answer; of one token nothing is shared.
    assert batch["tokens"].tolist() == [[[1, 2, 3, 4, 5, 3, 6], [7, 8, 7, 9, 9, 0, 0]]]
    assert batch["targets"].tolist() == [[[2, 0, 4, 5, 0, 6, 0], [8, 0, 9, 9, 0, 0, 0]]]
    assert batch["weights"].tolist() == [[[0, 0, 1, 1, 0, 1, 0], [1, 0, 1, 1, 0, 0, 0]]]
    assert batch["positions"].tolist() == [[[0, 1, 2, 3, 4, 2, 3], [0, 1, 0, 1, 2, 0, 0]]]
    one, two = 1 + BRANCH, 1 + 2 * BRANCH
    assert batch["segment_ids"].tolist() == [[[1, 1, one, one, one, two, two], [one, one, two, two, two, 0, 0]]]
    assert batch["documents"].tolist() == [[[4, 4, 0, 0, 0, 2, 2], [1, 1, 3, 3, 3, 4, 4]]]
    assert batch["margin"].tolist() == [[0.5, 1.0]]
    assert (count_tokens(batch, 1), count_tokens(batch, 2)) == (5 + 2, 5 + 2 + 4 + 3)


@pytest.mark.parametrize("packing", [True, False])
def test_items_of_one_prompt_share_it_as_far_as_a_row_has_room(packing):
    generator = np.random.Generator(np.random.PCG64(1))
    prompts = [generator.integers(1, 99, length).tolist() for length in (9, 1, 20, 5)]
    numbers = [number for number in range(4) for _ in range(5)]
    items = [
        begun(prompts[number], generator.integers(1, 99, generator.integers(1, 9)), number=float(index))
        for index, number in enumerate(numbers)
    ]
    settings = dict(batch_size=2, packing=packing, bucket=4, epochs=1, shuffle=False)
    steps = plan_items(items, seq_len=40, share=True, prompts=numbers, **settings)
    alone = plan_items(items, seq_len=40, **settings)
    assert sum(step.length * len(step.rows) for step in steps) < sum(step.length * len(step.rows) for step in alone)
    assert max(size for step in steps for row in step.groups for size in row) > 1
    seen = []
    for step in steps:
        assert step.length <= 40
        batch = {name: array[0] for name, array in collate_items(items, step).items()}
        for slot in np.flatnonzero(batch["items"]):
            number = int(batch["number"][slot])
            [document] = items[number].documents
            row, own = np.nonzero(batch["documents"] == slot)
            assert len(set(row)) == 1
            [segment] = set(batch["segment_ids"][row[0], own])
            start = np.flatnonzero(batch["segment_ids"][row[0]] == segment % BRANCH) if segment > BRANCH else []
            places = [*start, *own]
            np.testing.assert_array_equal(batch["tokens"][row[0], places], document.tokens)
            np.testing.assert_array_equal(batch["positions"][row[0], places], np.arange(len(document.tokens)))
            trained = batch["weights"][row[0], places]
            np.testing.assert_array_equal(trained[:-1], document.trained[1:])
            np.testing.assert_array_equal(
                batch["targets"][row[0], places][trained > 0], document.tokens[1:][document.trained[1:]]
            )
            seen.append(number)
    assert seen == list(range(20)) if not packing else sorted(seen) == list(range(20))


def random_items(count, sides, seed=0):
    generator = np.random.Generator(np.random.PCG64(seed))
    return [
        item(*(generator.integers(1, 99, n) for n in generator.integers(2, 30, sides)), number=float(number))
        for number in range(count)
    ]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("sides", [1, 2, 3])
def test_every_document_comes_out_once_an_epoch_and_knows_its_item(sides, packing):
    items = random_items(41, sides)
    steps = plan_items(items, seq_len=32, batch_size=4, grad_accum=2, packing=packing, bucket=8, epochs=2)
    seen = []
    for step in steps:
        batch = collate_items(items, step, 2)
        accum, rows, length = batch["tokens"].shape
        places = batch["items"].shape[1]
        assert (accum, rows) == (2, 4 if packing else 4 * sides)
        assert length <= (32 * sides if packing else 32)
        assert places == (1 << (places - 1).bit_length() if packing else 4)
        for a in range(accum):
            assert batch["documents"][a].max(initial=0) <= sides * places
            for n in np.flatnonzero(batch["items"][a]):
                number = int(batch["number"][a, n])
                for side, document in enumerate(items[number].documents):
                    inside = batch["documents"][a] == side * places + n
                    np.testing.assert_array_equal(batch["tokens"][a][inside], document.tokens)
                    assert batch["weights"][a][inside].sum() == document.trained[1:].sum()
                    assert len(set(batch["segment_ids"][a][inside])) == len(set(np.nonzero(inside)[0])) == 1
                seen.append(number)
        assert (batch["documents"] == sides * places).sum() == (batch["segment_ids"] == 0).sum()
    assert sorted(seen) == sorted([*range(41)] * 2)


def test_an_item_may_be_twice_in_a_micro_batch_where_epochs_meet():
    items = random_items(3, 2)
    steps = plan_items(items, seq_len=32, batch_size=2, packing=False, epochs=4)
    for packed, step in [(True, Step(((0, 1, 0, 1), ()), 120)), *((False, step) for step in steps)]:
        batch = collate_items(items, step)
        assert batch["items"].tolist() == [[1, 1]]
        assert set(np.unique(batch["documents"])) - {4} == {0, 1, 2, 3}, packed


def test_a_resumed_iterator_goes_on_with_the_same_batches():
    items = random_items(20, 2)
    steps = plan_items(items, seq_len=32, batch_size=4, packing=True, epochs=2)
    batches = loader(items, steps)
    next(batches)
    position = json.loads(json.dumps(batches.get_state()))
    resumed = loader(items, steps)
    resumed.set_state(position)
    rest = list(batches)
    assert len(rest) == len(steps) - 1
    for step, found, again in zip(steps[1:], rest, resumed, strict=True):
        for name, array in collate_items(items, step).items():
            np.testing.assert_array_equal(found[name], array)
            np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize("packing", [True, False])
def test_items_of_one_document_are_planned_and_laid_out_as_their_documents(packing):
    """So every run of sft resumes as it began, from whatever version of jlora."""
    items = random_items(30, 1)
    documents = [document for item in items for document in item.documents]
    settings = dict(seq_len=32, packing=packing, bucket=8, seed=3, epochs=2.5)
    steps = plan_items(items, batch_size=3, grad_accum=2, **settings)
    assert steps == plan([len(document.tokens) for document in documents], batch_size=6, **settings)
    for step, batch in zip(steps, loader(items, steps, 2, by_item=False), strict=True):
        expected = collate(documents, step, 2)
        assert batch.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(batch[name], array)
        whole = collate_items(items, step, 2)
        assert count_tokens(batch, 1) == count_tokens(whole, 1) == (batch["segment_ids"] > 0).sum()


def test_items_that_do_not_go_together_are_refused():
    settings = dict(seq_len=32, batch_size=2, packing=False, epochs=1)
    with pytest.raises(ValueError) as error:
        plan_items([item([1, 2], label=1.0), item([1, 2]), item([1, 2], [3, 4], label=1.0)], **settings)
    for words in ("item 1: found 1 document and the values []", "item 2: found 2 documents and the values ['label']"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"found values called \['items', 'tokens'\], expected names other than"):
        loader([item([1, 2], tokens=1.0, items=2.0)], [])
    with pytest.raises(ValueError, match="found no items"):
        plan_items([], **settings)
    [step] = plan_items(THREE, seq_len=4, batch_size=2, grad_accum=2, packing=False, epochs=1)
    with pytest.raises(ValueError, match="found a step that was not planned for grad_accum=1"):
        collate_items(THREE, step, 1)


@pytest.mark.parametrize("held", [("chosen", "rejected"), ("chosen",)])
def test_answers_none_of_which_is_trained_teach_nothing(tokenizer, held):
    user = {"role": "user", "content": "hi"}
    good = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")} | {"prompt": [user]}
    bad = good | {side: [{**good[side][0], "train": False}] for side in held}
    items, report = encode_preferences([bad, good], tokenizer, seq_len=64, note=lambda message: None)
    assert (len(items), report.untrained) == (1, 1)
    with pytest.raises(UserError, match="no token to train on"):
        encode_preferences([bad], tokenizer, seq_len=64)
