"""Processes that share the blocks of one model write the very folder that one writes alone."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from subspan.hosts import text

BAD_INPUT = Path(__file__).parents[1] / "bad_input" / "test_stream.py"


def helper():
    """The processes that are forked, and killed, by the tests of bad input."""
    spec = importlib.util.spec_from_file_location("stream_bad_input", BAD_INPUT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**helper().SIZES)).double().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    words = text.train_tokenizer(text.prose()[:20_000], 300)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("method, sequential", [("svd_llm", True), ("welore", False)])
def test_two_processes_write_what_one_writes(folder, method, sequential):
    other = helper()
    how = {"method": method, "args": other.SVD["args"], "batches": other.WINDOWS}
    assert other.check_survives(folder, -1, how, sequential=sequential, world=2) == 0


@pytest.mark.full
def test_torchrun_starts_the_command_line(folder):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    verb = ["subspan", "compress", str(folder), "--stream", "--method", "svd_llm", "--err", "0.5"]
    verb += ["--calibrate", "@prose", "--tokens", "120", "--window", "40", "-o"]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    runs = {
        "one": [sys.executable, "-m", *verb],
        "two": [*torchrun, "--standalone", "--nproc-per-node", "2", "-m", *verb],
    }
    for name, command in runs.items():
        done = subprocess.run(
            [*command, str(folder.parent / name)], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("wrote ") == 1
    assert helper().contents(folder.parent / "one") == helper().contents(folder.parent / "two")
