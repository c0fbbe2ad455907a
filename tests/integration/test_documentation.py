"""What the documents show runs: the Python in the READMEs, the examples, and the commands that are named."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Daemon

pytestmark = pytest.mark.pool

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted(
    str(path.relative_to(ROOT))
    for place in ("docs/*.md", "docs/howto/*.md", "docs/reference/*.md", "docs/explanation/*.md")
    for path in ROOT.glob(place)
    if path.name != "protocol.md"  # Its packets have tests of their own.
)
READMES = ["README.md", "msharefs/README.md"]
PATIENCE = 30
_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\w+\.py)\n")
"""What a block starts with that is a file, to be run by others."""


def blocks(document: str, language: str) -> list[str]:
    """The fenced code blocks of a document in that language, in order."""
    return [text for kind, text in _FENCE.findall((ROOT / document).read_text()) if kind == language]


def run(mount: Path, *command: str) -> str:
    """Run a command as a process of its own, which must succeed; what it printed."""
    env = {**os.environ, "MSHAREFS": str(mount), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=mount.parent, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def expected_output(block: str) -> list[str]:
    """What the lines of a block say they print: the comments behind ``print(...)``."""
    return re.findall(r"^\s*print\(.*\)\s+# (.*)$", block, re.MULTILINE)


@pytest.mark.parametrize("document", READMES)
def test_python_of_a_readme_runs_and_prints_what_it_says(daemon: Daemon, document: str) -> None:
    """Each block in a process of its own, one after the other, on the same daemon."""
    found = blocks(document, "python")
    assert found, f"{document} shows no Python"
    for block in found:
        assert run(daemon.mount, sys.executable, "-c", block).splitlines() == expected_output(block)
    assert leftovers(daemon.mount) == []


@pytest.mark.parametrize("guide", GUIDES)
def test_every_block_of_a_guide_runs(daemon: Daemon, guide: str, tmp_path: Path) -> None:
    """One after the other, in one directory, each in a process of its own; one that begins `# name.py` is that file.

    What cannot be run here, as root of a real machine would, is marked as text. Nothing is left at the end.
    """
    if "unshare" in (ROOT / guide).read_text() and os.geteuid() != 0:
        pytest.skip("namespaces are for root")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "MSHAREFS": str(daemon.mount), "PATH": path, "PYTHONPATH": str(tmp_path)}
    for kind, text in _FENCE.findall((ROOT / guide).read_text()):
        name = _FILE.match(text)
        if kind == "python" and name:
            (tmp_path / name[1]).write_text(text)
        elif kind in ("python", "sh"):
            command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
            assert done.returncode == 0, f"{guide}: {text}\n{done.stdout}{done.stderr}"
            if kind == "python":
                assert done.stdout.splitlines() == expected_output(text)
        else:
            assert kind in ("text", "{eval-rst}"), f"{guide}: a block of {kind!r} is run by nobody"
    assert leftovers(daemon.mount) == []


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """By the same command as scripts/docs."""
    if any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo", "sphinx_click")):
        pytest.skip("Sphinx is not installed; scripts/setup installs it")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "SIGBUS" in (tmp_path / "reference" / "errors.html").read_text()
    assert "populate" in (tmp_path / "reference" / "commands.html").read_text()


def test_the_consumer_reads_what_the_dead_donor_wrote(daemon: Daemon) -> None:
    """The example of the series: two processes that never live at the same time, the same address, one text."""
    donor = run(daemon.mount, sys.executable, str(ROOT / "examples/donor.py"), "documented")
    assert leftovers(daemon.mount) == ["documented"]
    consumer = run(daemon.mount, sys.executable, str(ROOT / "examples/consumer.py"), "documented")
    assert "'Some random shared text'" in donor
    assert "reads 'Some random shared text'" in consumer
    assert "0x20000000000" in donor
    assert "0x20000000000" in consumer
    assert leftovers(daemon.mount) == []


def test_a_store_is_saved_while_it_changes(daemon: Daemon, tmp_path: Path) -> None:
    """What the child has saved adds up, and is not what the store holds by then."""
    told = run(daemon.mount, sys.executable, str(ROOT / "examples/checkpoint.py"), str(tmp_path / "saved"))
    assert "saved 50000 accounts that hold 5000000 in all" in told
    assert "the store holds 5000000" in told
    assert ", and 0 of its accounts" not in told
    assert leftovers(daemon.mount) == []


def test_arrays_are_shared(daemon: Daemon) -> None:
    """Structured, larger than 2 GiB, and not to be written; changed by another process, where it is shown."""
    told = run(daemon.mount, sys.executable, str(ROOT / "examples/arrays.py")).splitlines()
    assert told == [
        "100000 particles have moved by 1.0, the last is 99999",
        "a reader sees 1.0 and 2.0 of 3 GiB",
        "and cannot write: assignment destination is read-only",
    ]
    assert leftovers(daemon.mount) == []


def test_tensors_are_shared(daemon: Daemon) -> None:
    """Changed in place, which another process sees; while there is one, the memory stays."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed: 200 MB, for one example")
    told = run(daemon.mount, sys.executable, str(ROOT / "examples/tensors.py")).splitlines()
    assert told == [
        "times 1.0, another process sees a mean of 32767.5",
        "times 2.0, another process sees a mean of 65535.0",
        "the region is not detached while there is a tensor on it",
    ]
    assert leftovers(daemon.mount) == []


def test_pointers_are_followed_by_all(daemon: Daemon) -> None:
    """The table that three processes fill together has what one would have counted."""
    told = run(daemon.mount, sys.executable, str(ROOT / "examples/pointers.py")).splitlines()
    assert told[0].startswith("12 nodes by ")
    assert told[1] == "as often as it is there: True"
    assert int(told[2].removeprefix("links from one process's node to another's: ")) > 0
    assert leftovers(daemon.mount) == []


def test_commands_named_in_the_readme_exist() -> None:
    """Every scripts/... that README.md names can be executed, and every option of ours that it shows is known."""
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\bscripts/\w+", text))
    assert {"scripts/demo", "scripts/test"} <= named
    for command in sorted(named):
        assert os.access(ROOT / command, os.X_OK), f"{command} cannot be executed"


def test_modules_named_in_the_readme_can_be_run() -> None:
    """Every ``python -m ...`` of README.md answers to --help."""
    named = set(re.findall(r"python -m (benchmarks[\w.]*)", (ROOT / "README.md").read_text()))
    assert "benchmarks" in named
    for module in named:
        command = [sys.executable, "-m", module, "--help"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=PATIENCE).returncode == 0, module


@pytest.mark.parametrize("document", [*READMES, *GUIDES, "docs/protocol.md", "CHANGELOG.md"])
def test_files_a_document_links_to_exist(document: str) -> None:
    """Relative links lead somewhere."""
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text())
    missing = [link for link in links if "://" not in link and not ((ROOT / document).parent / link).exists()]
    assert missing == []


def test_an_arena_of_a_reference_page_takes_what_is_used(daemon: Daemon) -> None:
    """And finds the same mistakes as one that was filled beforehand."""
    told = run(daemon.mount, sys.executable, str(ROOT / "examples/arena.py"), "16").splitlines()
    mistakes = "100 records were used before they were initialised"
    assert [told[1], told[3]] == [f"memset: {mistakes}", f"reference page: {mistakes}"]
    assert "16384 KiB taken" in told[0]
    taken = re.search(r"(\d+) KiB taken", told[2])
    assert taken is not None
    assert 4 <= int(taken[1]) <= 128
    assert leftovers(daemon.mount) == []


def leftovers(mount: Path) -> list[str]:
    """The regions that are there."""
    return sorted(set(os.listdir(mount)) - {"mshare_info", ".regions", ".metrics"})
