"""`subspan compress --stream` from the command line."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from subspan import __main__
from subspan.cli import main
from subspan.cli.common import interrupted
from subspan.cli.compress import written


def stored(folder):
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def test_the_stream_and_the_memory_give_the_same_tensors_and_the_same_plan(good, tiny, page, tmp_path):
    verb = ["compress", tiny, "--method", "svd_llm", "--err", 0.5, "--calibrate", page, "--tokens", 256]
    for more in ([], ["--blockwise"]):
        one = good(*verb, *more, "-o", tmp_path / f"memory{len(more)}")
        two = good(*verb, *more, "--stream", "-o", tmp_path / f"stream{len(more)}")
        assert one["plan"] == two["plan"]
        a, b = stored(one["out"]), stored(two["out"])
        assert set(a) == set(b) and all(torch.equal(t, b[name]) for name, t in a.items())
        index = json.loads((Path(two["out"]) / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(b)


def test_again_it_says_the_same_and_other_arguments_are_refused(good, check_refused, tiny, tmp_path):
    verb = ["compress", tiny, "--stream", "--method", "svd", "-o", tmp_path / "out"]
    assert good(*verb, "--err", 0.5) == good(*verb, "--err", 0.5)
    check_refused(["exists and is not empty", "--force"], *verb, "--err", 0.25)
    assert good(*verb, "--err", 0.25, "--force")["plan"]["args"] == {"target": {"err": 0.25}}


def test_what_cannot_be_streamed_is_said_in_one_line(check_refused, page, tiny, tmp_path):
    verb = ["compress", tiny, "--stream", "--err", 0.5, "--calibrate", page, "-o", tmp_path / "out"]
    check_refused(["gradients", "leave out --stream"], *verb, "--method", "fwsvd")
    check_refused(["leave out --stream"], "compress", "smollm2", *verb[2:], "--method", "svd")


def test_an_interruption_says_where_the_work_lies(tmp_path):
    assert interrupted(tmp_path / "out").endswith(f"nothing was written to {tmp_path / 'out'}")
    (tmp_path / "out.partial").mkdir()
    assert "the same command goes on from there" in interrupted(tmp_path / "out")


def test_python_m_subspan_is_the_command_line_and_writing_adds_up(tmp_path):
    assert __main__.main is main
    assert written.__doc__.startswith("What there is to say")
