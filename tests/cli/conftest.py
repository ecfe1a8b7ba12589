"""A tiny Llama folder, and the command line called inside this process or in one of its own."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from subspan.cli import main
from subspan.hosts import text

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


class Outcome(NamedTuple):
    """What a call left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def call(*args):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
            code = 0
        except SystemExit as leave:
            code = leave.code
    return Outcome(code, out.getvalue(), err.getvalue())


def spawn(script, *args):
    """Python with a script, in a new process with one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], env=env, **pipes)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cli():
    """Call the command line in this process."""
    return call


@pytest.fixture(scope="session")
def good(cli):
    """Call it with --json, insist on success, and return what was printed."""

    def checked(*args):
        done = cli(*args, "--json")
        assert done.code == 0, done
        return done.json

    return checked


@pytest.fixture(scope="session")
def check_refused(cli):
    """Call it, insist on one line of error with these words and code 1, and return the line."""

    def checked(words, *args):
        done = cli(*args)
        assert (done.code, done.out) == (1, ""), done
        line = done.err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert [word for word in words if word not in line] == [], line
        return line

    return checked


@pytest.fixture(scope="session")
def process():
    """Start Python in a process of its own."""
    return spawn


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A transformers folder with random weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    words = text.train_tokenizer(text.prose()[:20_000], 300)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """A file of 12,000 characters of English."""
    file = tmp_path_factory.mktemp("texts") / "page.txt"
    file.write_text(text.prose()[20_000:32_000], encoding="utf-8")
    return file
