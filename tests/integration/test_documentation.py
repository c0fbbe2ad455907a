"""What the documents show runs: every block of every one, the examples, and the commands that are named."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import Daemon
from documents import ROOT, Block, blocks, documents
from own_machine import OwnMachine

from mshare.cli import cli as mshare_command
from mshared.__main__ import main as mshared_command

pytestmark = pytest.mark.pool

PACKETS = "docs/protocol.md"
"""Its blocks are packets; tests/core/test_protocol_document.py has each of them."""
SHOWN = sorted({document for document in documents() if blocks(document)} - {PACKETS})
PATIENCE = 120
_STARTS_ONE = re.compile(r"mshare up|enable --now mshared")


def run(mount: Path, *command: str) -> str:
    """Run a command as a process of its own, which must succeed; what it printed."""
    env = {**os.environ, "MSHAREFS": str(mount), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=mount.parent, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def huge_pages_as_before() -> Iterator[None]:
    """Whatever a document does to the machine's pool is undone."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    before = setting.read_text()
    yield
    setting.write_text(before)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("huge_pages_as_before")
@pytest.mark.parametrize("document", SHOWN)
def test_every_block_of_a_document_runs(daemon: Daemon, document: str, tmp_path: Path) -> None:
    """One after the other, in one directory that looks like a checkout, each in a process of its own.

    Python and shell run; one that begins `# name.py`, or `/* name.c */`, is that file, which a later one uses. What is
    marked as text is what the one before it prints. A document that starts a daemon finds none, and stops it.
    """
    found = blocks(document)
    scripts = "".join(block.text for block in found if block.kind == "sh")
    if "scripts/" in scripts and not (Path(sys.prefix) / ".msharefs-setup").exists():
        pytest.skip("scripts/setup has not made this environment: it would change it now")
    starts_one = _STARTS_ONE.search(scripts) is not None
    with OwnMachine(tmp_path, None if starts_one else daemon.mount) as machine:
        if "systemctl --user" in scripts and not machine.has_user_manager():
            pytest.skip("systemd --user does not run here; scripts/setup installs systemd where CI is set")
        output = ""
        for number, block in enumerate(found):
            output = follow(machine, block, output, [later.text for later in found[number + 1 :]])
        if starts_one:
            assert machine.shell("ls -d /run/mshare /run/mshared 2> /dev/null || true").stdout == ""
    assert leftovers(daemon.mount) == []


def follow(machine: OwnMachine, block: Block, before: str, later: list[str]) -> str:
    """Do what a reader does with a block; what it printed. ``before`` is what the one before it has printed."""
    if block.file:
        machine.write(block.file, block.text)
        assert any(Path(block.file).stem in text for text in later), f"{block.file} is used by nobody"
        return ""
    if block.kind in ("python", "sh"):
        python = block.kind == "python"
        done = machine.run(sys.executable, "-c", block.text) if python else machine.shell(block.text)
        assert done.returncode == 0, f"{block.document}: {block.text}\n{done.stdout}{done.stderr}"
        if python:
            assert done.stdout.splitlines() == block.printed
        return done.stdout
    if block.kind == "text":
        assert block.shows(before), f"{block.document}: {block.text}\nis not what was printed:\n{before}"
    elif block.kind == "":
        assert block.is_drawing, f"{block.document}: nobody runs\n{block.text}"
    else:
        assert block.kind == "{eval-rst}", f"{block.document}: a block of {block.kind!r} is run by nobody"
        assert block.document.startswith("docs/"), f"{block.document} is no part of the site, which Sphinx builds"
        assert "code-block" not in block.text, f"{block.document}: nobody runs\n{block.text}"
    return ""


@pytest.mark.parametrize("document", documents())
def test_all_code_of_a_document_stands_in_blocks_that_are_found(document: str) -> None:
    """None is hidden by a fence of another form, or by indentation alone."""
    text = (ROOT / document).read_text()
    fences = re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)
    assert len(fences) == 2 * len(blocks(document))
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^(?![ \t]*[-*\d]).*\n\n(?: {4}|\t).*", prose, re.MULTILINE) == []


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """By the same command as scripts/docs."""
    if any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo", "sphinx_click")):
        pytest.skip("Sphinx is not installed; scripts/setup installs it")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "SIGBUS" in (tmp_path / "reference" / "errors.html").read_text()
    assert "populate" in (tmp_path / "reference" / "commands.html").read_text()


def test_examples_in_docstrings_run(daemon: Daemon) -> None:
    """The reference shows them."""
    found = [str(path) for path in (ROOT / "client").rglob("*.py") if ">>> " in path.read_text()]
    found += [str(path) for path in (ROOT / "msharefs").rglob("*.py") if ">>> " in path.read_text()]
    assert str(ROOT / "client/mshare/__init__.py") in found
    told = run(daemon.mount, sys.executable, "-m", "doctest", "-v", *found)
    assert "+SKIP" not in told
    assert re.search(r"^[1-9]\d* passed", told, re.MULTILINE)
    assert leftovers(daemon.mount) == []


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


@pytest.mark.parametrize("document", documents())
def test_commands_named_in_sentences_exist(document: str) -> None:
    """Of `mshare` and `mshared` every option, too; of the rest that it can be run, or answers to --help."""
    for words in map(str.split, named(document)):
        own, _, daemon_s = " ".join(words).partition(" -- ")
        if words[0] == "mshare":
            command = mshare_command.commands[words[1]]
            assert options(own) <= options_of(command), f"{document}: {own}"
            assert options(daemon_s) <= options_of(mshared_command), f"{document}: {daemon_s}"
        elif words[0] == "mshared":
            assert options(own) <= options_of(mshared_command), f"{document}: {own}"
        elif words[0].startswith("scripts/"):
            assert os.access(ROOT / words[0], os.X_OK), f"{document}: {words[0]} cannot be executed"
        else:
            arguments = [sys.executable, *words[1:3], "--help"]
            told = subprocess.run(arguments, cwd=ROOT, capture_output=True, timeout=PATIENCE, text=True, check=True)
            assert options(own) <= options(told.stdout), f"{document}: {own}"


def test_figures_of_the_first_screen_are_those_of_the_table() -> None:
    """Page tables of fifty processes: with ordinary shared memory, and here."""
    text = (ROOT / "README.md").read_text()
    (row,) = re.findall(r"\| page tables of 50 processes \| (\S+) MiB \| (\S+) MiB \| (\S+) MiB \|", text)
    (claim,) = re.findall(r"pay (\S+) MiB for their page tables\. Here they\s+pay (\S+) or (\S+) MiB", text)
    assert (claim[1], claim[2], claim[0]) == row


def named(document: str) -> list[str]:
    """The commands of ours that stand in a document's sentences."""
    prose = re.sub(r"^ *```.*?^ *```$", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    code = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose)]
    ours = re.compile(r"(?:sudo )?(?:\.venv/bin/)?(mshared? .+|python -m benchmarks.*|scripts/\w+.*)")
    return [found[1] for found in map(ours.fullmatch, code) if found]


def options(words: str) -> set[str]:
    return set(re.findall(r"(?<!\S)--[a-z][a-z-]*", words))


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("document", documents())
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
