"""`lmscale doctor` looks at this machine; here, that it finds what is there and tells the two apex apart."""

from lmscale.launcher import doctor
from lmscale.launcher.doctor import examine
from tests.config.fake_apex import install_apex


def test_findings_cover_what_training_needs_and_missing_ones_have_a_remedy():
    findings = {finding.name: finding for finding in examine()}
    assert {
        "python",
        "torch",
        "deepspeed",
        "megatron-core",
        "devices",
        "apex",
        "adam, adamw",
        "ninja",
        "ssh",
        "/dev/shm",
    } <= set(findings)
    assert findings["torch"].state == "ok"
    assert all(finding.remedy for finding in findings.values() if finding.state == "missing")


def test_the_apex_of_pypi_is_told_from_nvidias(monkeypatch, tmp_path):
    install_apex(monkeypatch, tmp_path / "pypi", nvidia=False)
    assert "not NVIDIA's" in doctor._apex().value
    assert doctor._apex().remedy.startswith("pip uninstall apex")
    install_apex(monkeypatch, tmp_path / "nvidia")
    assert doctor._apex().state == "ok"


def test_an_op_whose_compilation_was_cut_off_is_noted(monkeypatch, tmp_path):
    op = tmp_path / "cpu_adam"
    op.mkdir()
    (op / "cpu_adam.so").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert [finding.state for finding in examine() if finding.name == "DeepSpeed ops"] == ["ok"]
    (op / "lock").touch()
    (finding,) = [finding for finding in examine() if finding.name == "DeepSpeed ops"]
    assert finding.state == "note"
    assert "cpu_adam is locked" in finding.value
    assert finding.remedy.startswith(f"if no ninja runs: rm {op / 'lock'}")
