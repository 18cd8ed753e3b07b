"""Bases for the tests of adaptations."""

from __future__ import annotations

import pytest

from tests.adapt.bases import Bases


@pytest.fixture(scope="session")
def bases(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(corpus, tmp_path_factory.mktemp("bases"))
