"""`lmscale doctor --hostfile`: it names the host that is wrong, and what is wrong there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmscale.cli.main import main
from lmscale.launcher import reach
from lmscale.launcher.environment import free_port
from lmscale.launcher.host_facts import code_hash, gather, gloo_interface, interfaces, nccl_interface
from lmscale.launcher.hosts import Host
from lmscale.launcher.preflight import examine_hosts
from lmscale.launcher.shell import python_line
from tests.launcher.fake_ssh import NO_KEY, NO_NAME, put_ssh_on_path, standard_input
from tests.launcher.runs import write_corpus

FAILURES = {
    "gone": NO_NAME,
    "locked": NO_KEY,
    "strange": ("Host key verification failed.", 255),
    "empty": ("sh: 1: exec: python: not found", 127),
    "broken": ("ModuleNotFoundError: No module named 'lmscale'", 1),
}
FILTERS = {
    "old": """text.replace('"torch": "', '"torch": "0.')""",
    "bare": """text.replace('"deepspeed": "', '"deepspeed": null, "was": "')""",
    "edited": """text.replace('"code": "', '"code": "edited')""",
    "late": """text if text.startswith("{") else repr(float(text) - 90) + "\\n" """,
    "full": """text.replace('"disk_free_bytes": ', '"disk_free_bytes": 1.0e-9, "was": ')""",
    "inward": """text.replace('"gloo": {', '"gloo": {"interface": "lo", "address": "127.0.1.1"}, "was": {')""",
    "stale": """text.replace('{"hash": "', '{"hash": "stale')""",
    "blind": """text.replace('{"hash": "', '{"hash": null, "was": "').replace('"problem": null', '"problem": "no such file"')""",
}


@pytest.fixture
def outward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gloo take an interface that is not the loopback."""
    found = [name for name, address in interfaces().items() if not address.startswith("127.")]
    if not found:
        pytest.skip("this machine has no network interface but the loopback")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", found[0])


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outward: None) -> Path:
    put_ssh_on_path(tmp_path, monkeypatch, FAILURES, FILTERS)
    monkeypatch.setenv("COLUMNS", "200")
    write_corpus(tmp_path / "corpus")
    return tmp_path


def diagnose(directory: Path, capsys: pytest.CaptureFixture[str], *hosts: str, data: bool = False) -> tuple[int, str]:
    path = directory / "hosts"
    path.write_text("".join(f"{host} slots=1\n" for host in hosts))
    more = ["--data", str(directory / "corpus")] if data else []
    status = main(["doctor", "--hostfile", str(path), *more])
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    ("host", "part"),
    [
        ("gone", "ssh: ssh: Could not resolve hostname gone: Name or service not known; correct the name"),
        ("locked", "ssh: root@locked: Permission denied .*; it must work without a password: ssh-copy-id locked"),
        ("strange", "ssh: Host key verification failed.; call ssh strange once by hand"),
        ("empty", f"ssh: no {re.escape(sys.executable)} there; install lmscale at the same path"),
        ("broken", "ssh: ModuleNotFoundError: No module named 'lmscale'; install the same lmscale"),
        ("old", r"versions: torch 0\.\d\S*, and here \d\S*; install the same versions on every host"),
        ("bare", r"versions: deepspeed not installed, and here \d\S*; install"),
        ("edited", "code: edited.., and here "),
        ("late", r"clock: -(89|90)\.\d+ s, give or take .*; set it by NTP"),
        (
            "inward",
            r"gloo: lo \(127\.0\.1\.1\), which other hosts do not reach; name the interface: GLOO_SOCKET_IFNAME",
        ),
    ],
)
def test_the_host_that_is_wrong_is_named(directory, capsys, host, part):
    status, out = diagnose(directory, capsys, "good", host)
    assert status == 1
    assert re.search(f"^{host}: {part}", out, re.MULTILINE), out
    assert not re.search("^good: ", out, re.MULTILINE), out
    assert "all hosts: all-reduce: not tried" in out


@pytest.mark.parametrize(
    ("host", "part"),
    [
        ("stale", "stale..., and good has [0-9a-f]{8}; copy it anew to every host"),
        ("blind", "no such file; copy it there"),
    ],
)
def test_a_corpus_must_be_the_same_on_every_host(directory, capsys, host, part):
    status, out = diagnose(directory, capsys, "good", host, data=True)
    assert status == 1
    assert re.search(f"^{host}: data {directory}/corpus: {part}", out, re.MULTILINE), out


@pytest.mark.distributed
def test_hosts_that_are_right_sum_over_all_of_them(directory, capsys, monkeypatch):
    """A full disk is noted, and does not keep a run from starting."""
    monkeypatch.setattr("lmscale.launcher.preflight.rendezvous_address", lambda *_, **__: "127.0.0.1")
    status, out = diagnose(directory, capsys, "good", "full", data=True)
    assert status == 0, out
    assert re.search(r"^full: disk: 0.0 GiB free; ", out, re.MULTILINE)
    assert re.search(
        r"^all hosts: all-reduce: \d+\.\d\d GB/s \(\d+\.\d Gbit/s\) on each host's link, gloo", out, re.MULTILINE
    )


def test_what_a_hosts_shell_says_to_everyone_is_passed_over(directory, capsys, monkeypatch):
    def line(module: str, *arguments: str) -> str:
        return f"echo Welcome; {python_line(module, *arguments)}"

    monkeypatch.setattr("lmscale.launcher.preflight.python_line", line)
    _, out = diagnose(directory, capsys, "good", "edited")
    assert not re.search("^good: ", out, re.MULTILINE), out


def test_the_rest_of_a_script_on_standard_input_is_left(directory, monkeypatch):
    def line(module: str, *arguments: str) -> str:
        if module.endswith("host_facts"):
            return python_line(module, *arguments)
        return """cat >&2; echo '{"backend": "gloo", "bus_bytes_per_second": 1.0e9}'"""

    monkeypatch.setattr("lmscale.launcher.preflight.python_line", line)
    with standard_input(b"the next command\n"):
        assert examine_hosts([Host("good", 1)]).is_ready


def test_an_all_reduce_that_fails_names_the_host(directory, monkeypatch):
    def line(module: str, *arguments: str) -> str:
        if module.endswith("host_facts"):
            return python_line(module, *arguments)
        return "echo No route to host >&2; exit 1" if arguments[0] == "1" else "echo '{}'"

    monkeypatch.setattr("lmscale.launcher.preflight.python_line", line)
    found = examine_hosts([Host("good", 1), Host("cut", 1)])
    assert found.all_reduce.state == "missing"
    assert found.all_reduce.value == "cut: No route to host"
    assert not found.is_ready


def test_a_host_that_is_cut_off_is_named_and_not_those_that_wait_for_it(directory, monkeypatch):
    def line(module: str, *arguments: str) -> str:
        if module.endswith("all_reduce"):
            return "echo Timed out waiting for clients >&2; exit 1"
        cut = 'test "$FAKE_SSH_HOST" = cut && { echo No route to host >&2; exit 1; }; '
        return (cut if arguments[0] == "connect" else "") + python_line(module, *arguments)

    monkeypatch.setattr("lmscale.launcher.preflight.python_line", line)
    monkeypatch.setattr("lmscale.launcher.preflight.rendezvous_address", lambda *_, **__: "127.0.0.1")
    found = examine_hosts([Host("good", 1), Host("well", 1), Host("cut", 1)]).all_reduce
    assert found.value == "cut: does not reach good (127.0.0.1): No route to host"
    found = examine_hosts([Host("good", 1), Host("well", 1)]).all_reduce
    assert found.value == "good, well: Timed out waiting for clients"


def test_a_port_that_nobody_listens_at_is_not_reached(capsys):
    assert reach.main(["connect", "127.0.0.1", str(free_port())]) == 1
    assert capsys.readouterr().err == "Connection refused\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--hostfile", "nowhere"], "--hostfile = 'nowhere': cannot be read"),
        (["--data", "corpus"], "--data = 'corpus': is read with --hostfile only"),
    ],
)
def test_wrong_input_is_refused(capsys, arguments, part):
    assert main(["doctor", *arguments]) == 2
    assert part in capsys.readouterr().err


def test_no_ssh_here_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    (tmp_path / "hosts").write_text("a slots=1\n")
    assert main(["doctor", "--hostfile", str(tmp_path / "hosts")]) == 2
    assert (
        "needs ssh, which is not on the PATH; install it, on Debian: apt-get install openssh-client"
        in capsys.readouterr().err
    )


def test_facts_come_without_torch(tmp_path):
    program = (
        "import sys; from lmscale.launcher.host_facts import gather; from pathlib import Path; "
        "gather(Path('.'), []); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_facts_are_json_and_hash_a_corpus(tmp_path):
    write_corpus(tmp_path / "corpus")
    facts = json.loads(json.dumps(gather(tmp_path / "not" / "yet", [str(tmp_path / "corpus"), "nowhere"])))
    assert len(facts["data"][str(tmp_path / "corpus")]["hash"]) == 64
    assert "nowhere" in facts["data"]["nowhere"]["problem"]
    assert facts["disk_free_bytes"] > 0


def test_the_code_hash_sees_contents_and_names(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = code_hash(tmp_path)
    (tmp_path / "a.py").write_text("2")
    second = code_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, code_hash(tmp_path)}) == 3


KNOWN = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (None, "ib0"),
        ("eth", "eth0"),
        ("=eth", None),
        ("=eth0", "eth0"),
        ("^ib,lo", "docker0"),
        ("^=lo,docker0,ib0", "eth0"),
    ],
)
def test_nccl_chooses_by_its_rules(rule, expected):
    environ = {} if rule is None else {"NCCL_SOCKET_IFNAME": rule}
    assert nccl_interface(environ, KNOWN)["interface"] == expected


def test_gloo_takes_the_named_interface_or_the_host_names(monkeypatch):
    assert gloo_interface({"GLOO_SOCKET_IFNAME": "eth0"}, KNOWN) == {"interface": "eth0", "address": "10.0.0.1"}
    assert gloo_interface({"GLOO_SOCKET_IFNAME": "eth9"}, KNOWN) == {"interface": "eth9", "address": None}
    monkeypatch.setattr("socket.gethostbyname", lambda _: "10.1.0.1")
    assert gloo_interface({}, KNOWN)["interface"] == "ib0"
    monkeypatch.setattr("socket.gethostbyname", lambda _: "127.0.1.1")
    assert gloo_interface({}, KNOWN) == {"interface": "lo", "address": "127.0.1.1"}
