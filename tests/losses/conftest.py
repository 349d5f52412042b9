"""One tiny random Llama with an adapter, in TRL's trainers and in jlora, and their documents in rows."""

import copy
import dataclasses
import functools
import warnings

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import jlora
from jlora import losses
from jlora.losses import Pairs, by_document

SETTINGS = dict(report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True)
WIDTH = 16
# Sorted by the policy's, the reference's and either side's log-ratios, the three lie differently: "aot" sorts them.
PAIRS = [
    {"prompt": "ab", "chosen": "g95fu", "rejected": "lrv6", "margin": 0.5},
    {"prompt": "jklmno", "chosen": "7dg", "rejected": "zh", "margin": -0.25},
    {"prompt": "xyz", "chosen": "lvg9", "rejected": "yinxl", "margin": 1.5},
]
LOADERS = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM.from_pretrained,
    "SEQ_CLS": functools.partial(transformers.AutoModelForSequenceClassification.from_pretrained, num_labels=1),
}


@pytest.fixture(scope="session")
def tokenizer(byte_tokenizer):
    """The byte tokenizer with padding of its own, not shared: trainers change theirs."""
    own = copy.deepcopy(byte_tokenizer)
    own.add_special_tokens({"pad_token": "<|pad|>"})
    return own


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=42,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=257,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_trainer(base_folder, tokenizer, tmp_path_factory):
    """make_trainer(class, config class, records, **settings): TRL's trainer of the model with the adapter."""

    def make(trainer_class, config_class, records, *, task_type="CAUSAL_LM", extra=None, **settings):
        base = LOADERS[task_type](base_folder, attn_implementation="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = trainer_class(
                model=base,
                args=config_class(output_dir=str(tmp_path_factory.mktemp("trainer")), **(SETTINGS | settings)),
                train_dataset=datasets.Dataset.from_list(records),
                processing_class=tokenizer,
                peft_config=peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type=task_type),
                **(extra or {}),
            )
        randomise(trainer.model)
        trainer.model.train()
        return trainer

    return make


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(adapter_parameters(model).items()):
            parameter.copy_(0.1 * torch.randn_like(parameter))


def adapter_parameters(model):
    return {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name and ".default" in name
    }


@dataclasses.dataclass
class Document:
    """Tokens, whether each belongs to a completion, the document's number, and values of completion tokens by name."""

    tokens: np.ndarray
    completion: np.ndarray
    number: int
    values: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def documents_of():
    """documents_of(ids, attention, completion, numbers): the documents of a padded batch of torch tensors."""

    def make(ids, attention, completion, numbers, **values):
        return [
            Document(
                ids[row][attention[row] == 1].numpy(),
                completion[row][attention[row] == 1].numpy(),
                number,
                {name: np.asarray(value[row]) for name, value in values.items()},
            )
            for row, number in enumerate(numbers)
        ]

    return make


def rows_of(documents, count, per_row):
    """Documents in rows; where there are two a row, they are some way apart in the list."""
    rows = [documents[i :: len(documents) // per_row] for i in range(len(documents) // per_row)]
    shape = (len(rows), WIDTH * per_row)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids", "targets")}
    batch |= {name: np.zeros(shape, np.float32) for name in ("weights", "within", *documents[0].values)}
    batch["documents"] = np.full(shape, count, np.int32)
    for row, members in enumerate(rows):
        start = 0
        for segment, document in enumerate(members):
            length = len(document.tokens)
            here, before = slice(start, start + length), slice(start, start + length - 1)
            batch["tokens"][row, here] = document.tokens
            batch["positions"][row, here] = np.arange(length)
            batch["segment_ids"][row, here] = segment + 1
            batch["documents"][row, here] = document.number
            batch["targets"][row, before] = document.tokens[1:]
            batch["weights"][row, before] = document.completion[1:]
            batch["within"][row, before] = 1
            for name, values in document.values.items():
                batch[name][row, before][document.completion[1:] == 1] = values[: document.completion.sum()]
            start += length
    return {name: jnp.asarray(value) for name, value in batch.items()}


def read_by_the_model(batch):
    """Always the same arrays, so that the model is compiled once."""
    return {name: batch[name] for name in ("tokens", "positions", "segment_ids", "targets", "weights")}


class Ours:
    """The same model and adapter in jlora."""

    def __init__(self, base_folder, adapter_folder, scratch):
        self.model, params = jlora.load(base_folder)
        self.frozen, self.trainable = jlora.lora.split(jlora.load_adapter(params, adapter_folder))
        self.scratch = scratch
        self._forward, self._pullback = jax.jit(self.scores), jax.jit(self._gradients)

    def hidden(self, trainable, batch):
        params = jlora.lora.combine(self.frozen, trainable)
        return self.model.hidden(params, batch["tokens"], batch["positions"], batch["segment_ids"])[0]

    def scores(self, trainable, batch):
        head = self.model.head(jlora.lora.combine(self.frozen, trainable))
        hidden = self.hidden(trainable, batch)
        return losses.token_scores(
            self.model.project, head, hidden, batch["targets"], batch["weights"], chunk=24
        ).log_probs

    def _gradients(self, trainable, batch, cotangent):
        _, pullback = jax.vjp(lambda trainable: self.scores(trainable, batch), trainable)
        return pullback(cotangent)[0]

    def rows(self, documents, count):
        """The documents one a row and two a row."""
        return [rows_of(documents, count, per_row) for per_row in (1, 2)]

    def log_probs(self, batch):
        return self._forward(self.trainable, read_by_the_model(batch))

    def reference(self, batch):
        """The base's: an adapter of zeros changes nothing."""
        return self._forward(jax.tree.map(jnp.zeros_like, self.trainable), read_by_the_model(batch))

    def loss(self, objective, batch, weights="weights"):
        """(objective(log_probs, reference, batch), its gradients by PEFT's names).

        This is value_and_grad in two halves, so that the model is compiled once for all objectives.
        """
        scored = batch | {"weights": batch[weights]}
        half = jax.value_and_grad(objective)
        value, cotangent = half(self.log_probs(scored), self.reference(scored), batch)
        return float(value), self.named(self._pullback(self.trainable, read_by_the_model(scored), cotangent))

    def named(self, gradients):
        jlora.save_adapter(self.scratch / "gradients", jlora.lora.combine(self.frozen, gradients))
        return load_file(self.scratch / "gradients" / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def ours(base_folder, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("ours")
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    randomise(model)
    model.save_pretrained(scratch / "adapter")
    return Ours(base_folder, scratch / "adapter", scratch)


@pytest.fixture
def agree(parity, ours):
    """agree(row, trainer, loss, found): TRL's loss() and its LoRA gradients are those found, and how nearly is noted.

    Args:
        found: (loss, gradients) for each layout.
        tolerance: float32's; a difference of sums of log-probabilities near -40 that is near 1 has 1e-5 of it.
    """

    def check(row, trainer, loss, found, tolerance=2e-5):
        trainer.model.zero_grad()
        expected = loss()
        expected.backward()
        gradients = {name: leaf.grad.numpy() for name, leaf in adapter_parameters(trainer.model).items()}
        for value, named in found:
            difference = abs(value - expected.item()) / abs(expected.item())
            assert named.keys() == gradients.keys()
            largest = max(np.max(np.abs(named[name] - of)) / np.max(np.abs(of)) for name, of in gradients.items())
            parity("objective", row, "loss", difference)
            parity("objective", row, "LoRA gradients", largest)
            assert difference < tolerance and largest < tolerance, (value, expected.item(), largest)

    return check


class PairSlots:
    """Six documents in eight slots, the fourth of each side empty."""

    records = PAIRS
    numbers, count = (0, 1, 2, 4, 5, 6), 8
    items = np.float32([1, 1, 1, 0])

    def sums(self, log_probs, batch):
        return by_document(log_probs * batch["weights"], batch["documents"], self.count)

    def pairs(self, policy, reference, batch):
        """Pairs of the documents' sums."""
        tokens = self.sums(jnp.ones_like(batch["weights"]), batch)
        halves = [jnp.split(sums, 2) for sums in (policy, reference, tokens)]
        return Pairs(*halves[0], *halves[1], *halves[2], jnp.asarray(self.items))

    def of(self, log_probs, reference, batch):
        """Pairs of tokens' log-probabilities."""
        return self.pairs(self.sums(log_probs, batch), self.sums(reference, batch), batch)

    def mean(self, values):
        assert values.shape == (4,)
        return jnp.sum(values) / 3

    def chosen_nll(self, log_probs, weights, batch):
        """The mean over the chosen completions' counted tokens, by `mean_nll`."""
        items = jnp.asarray(self.items)
        sums, tokens = (by_document(of, batch["documents"], self.count)[:4] for of in (log_probs * weights, weights))
        return self.mean(losses.mean_nll(sums, items, jnp.sum(tokens) / jnp.sum(items)))


@pytest.fixture(scope="session")
def slots():
    return PairSlots()


@pytest.fixture
def random_pairs():
    """Four random pairs; the second slot is empty."""
    values = -3 * jnp.abs(jax.random.normal(jax.random.key(0), (4, 4)))
    items = jnp.ones(4).at[1].set(0)
    tokens = jnp.arange(3.0, 7)
    return Pairs(*(values * items[None]), tokens * items, tokens[::-1] * items, items)


@pytest.fixture
def empty_slot(random_pairs):
    """empty_slot(loss): the empty slot's loss and gradients are 0, and the others' are as if it were not there."""

    def without(values):
        return Pairs(*(jnp.delete(leaf, 1) for leaf in values))

    def check(loss):
        values, pullback = jax.vjp(loss, random_pairs)
        expected, expected_pullback = jax.vjp(loss, without(random_pairs))
        np.testing.assert_allclose(jnp.delete(values, 1), expected, rtol=1e-6)
        gradients, expected = pullback(jnp.ones(4))[0], expected_pullback(jnp.ones(3))[0]
        assert values[1] == 0 and not gradients.chosen[1] and not gradients.rejected[1]
        for name in ("chosen", "rejected"):
            found = jnp.delete(getattr(gradients, name), 1)
            np.testing.assert_allclose(found, getattr(expected, name), rtol=1e-5, atol=1e-7)

    return check
