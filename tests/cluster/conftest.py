"""Four hosts for the tests of this directory, in namespaces of this machine; without root or a package they are skipped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cluster.hosts import TOOLS, Hosts
from tests.distributed.runs import write_corpus

sys.path.insert(0, str(TOOLS))
from cluster_network import Cluster, missing_for_a_cluster

NUM_HOSTS = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    lacking = missing_for_a_cluster()
    if lacking is not None:
        pytest.skip(f"a cluster {lacking}")
    shared = tmp_path_factory.mktemp("shared")
    write_corpus(shared / "tokens", np.random.default_rng(7), num_tokens=20_000)
    directory = tmp_path_factory.mktemp("cluster") / "files"
    made = Cluster.up(NUM_HOSTS, [shared], directory=directory)
    try:
        yield made
    finally:
        made.down()


@pytest.fixture
def hosts(cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """The cluster with all its hosts and links up, and after the test no process but those that it began with."""
    found = Hosts(cluster, request.node.name)
    yield found
    found.restore()
