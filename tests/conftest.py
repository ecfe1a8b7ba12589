"""One thread a worker: the tensors are tiny, and two workers share two cores."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

HERE = Path(__file__).parent
# Folders and files whose tests share what takes long to make: a second worker would make it again.
TOGETHER = ("cli", "demo", "hosts/test_trainer.py", "hosts/test_stream.py", "hosts/test_peft_types.py")


# First, as xdist writes the groups into the names of the tests in its own hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        where = item.path.relative_to(HERE).as_posix()
        for name in TOGETHER:
            if where.startswith(name):
                item.add_marker(pytest.mark.xdist_group(name))
