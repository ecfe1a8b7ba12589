"""Models shared by the tests of the hosts: a tiny random Llama, and SmolLM2 loaded once."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from subspan.hosts import text, transformers
from subspan.hosts.keep import Keeper


def tiny() -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes)).double().eval()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny()


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=text.train_tokenizer(text.prose()[:20_000], 300))


@pytest.fixture
def folder(tmp_path, llama, words):
    llama.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def smollm2() -> transformers.LoadedModel:
    return transformers.load("smollm2")


def pytest_collection_modifyitems(items):
    """One worker loads the real model, once."""
    for item in items:
        if item.get_closest_marker("smollm2"):
            item.add_marker(pytest.mark.xdist_group("smollm2"))


@pytest.fixture
def base(llama):
    """base(tie): the tied model, or one with a head of its own."""

    def made(tie):
        if tie:
            return llama
        config = copy.deepcopy(llama.config)
        config.tie_word_embeddings = False
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return LlamaForCausalLM(config).double().eval()

    return made


class Killed(Exception):
    """Stands for a process that ends here."""


@pytest.fixture
def dies_at():
    """dies_at(step): a block in which a training run ends after that step, once its checkpoint is written."""

    @contextmanager
    def block(step):
        after = Keeper.after

        def die(self, now, history):
            after(self, now, history)
            if now == step:
                raise Killed

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Keeper, "after", die)
            yield

    return block
