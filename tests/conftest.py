"""One thread and a CPU for every test, set before torch is imported: ranks are forked from this process."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import warnings

with warnings.catch_warnings():
    # What our dependencies warn of while they are imported is theirs; from here on a warning is an error.
    warnings.simplefilter("ignore")
    import lmscale.pretrain  # noqa: F401

import numpy as np
import pytest
import torch
from hypothesis import settings

from lmscale.parallel.op_builds import mend_builds
from tests.distributed.runs import write_corpus

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and every child of it would be deaf to Ctrl-C too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
mend_builds()  # of tests that use DeepSpeed's ops in this process
# Tests share their CPUs with others; how long an example takes says nothing.
settings.register_profile("lmscale", deadline=None)
settings.load_profile("lmscale")


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """Undo what happens to the environment: a model that is loaded makes this process rank 0 of 1 for DeepSpeed."""
    former = dict(os.environ)
    yield
    if dict(os.environ) != former:
        os.environ.clear()
        os.environ.update(former)


@pytest.fixture(scope="module", autouse=True)
def _environment_of_the_module() -> Iterator[None]:
    with environment_kept():
        yield


@pytest.fixture(autouse=True)
def _environment_of_the_test() -> Iterator[None]:
    with environment_kept():
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of some 20,000 tokens below 500 in documents of 1 to 200, by prefix."""
    prefix = tmp_path_factory.mktemp("corpus") / "tokens"
    write_corpus(prefix, np.random.default_rng(7), num_tokens=20_000)
    return str(prefix)
