"""`lmscale doctor` looks at this machine; here, that it finds what is there and tells the two apex apart."""

import sys
import types

import pytest

from lmscale.launcher import doctor
from lmscale.launcher.doctor import examine


def test_findings_cover_what_training_needs_and_missing_ones_have_a_remedy():
    findings = {finding.name: finding for finding in examine()}
    assert {"python", "torch", "deepspeed", "megatron-core", "devices", "apex", "ninja", "ssh", "/dev/shm"} <= set(
        findings
    )
    assert findings["torch"].state == "ok"
    assert all(finding.remedy for finding in findings.values() if finding.state == "missing")


@pytest.fixture
def apex(monkeypatch):
    """A package named apex, as on PyPI or as NVIDIA's."""

    def install(**attributes):
        package, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
        vars(optimizers).update(attributes)
        monkeypatch.setitem(sys.modules, "apex", package)
        if attributes:
            monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: package)

    return install


def test_the_apex_of_pypi_is_told_from_nvidias(apex):
    apex()
    assert "not NVIDIA's" in doctor._apex().value
    apex(FusedAdam=object)
    assert doctor._apex().state == "ok"
