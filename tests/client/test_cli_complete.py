"""Shells complete names of regions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Mshare = Callable[..., Any]
COMPLETE = {"_MSHARE_COMPLETE": "bash_complete"}


def words(mshare: Mshare, line: str, mount: Path | None = None) -> list[str]:
    """What bash would offer for the last word of a line."""
    count = len(line.split(" ")) - 1
    ran = mshare(mount=mount, env={**COMPLETE, "COMP_WORDS": line, "COMP_CWORD": str(count)})
    assert ran.status == 0
    return [row.partition(",")[2] for row in ran.out.splitlines() if row]


def test_names_of_regions_are_offered(mshare: Mshare, daemon: Any, client: Callable[..., Any], name: str) -> None:
    client().do(f"r = mshare.mshare({name!r}, None, 2 << 20, CREATE)")
    for command in ("heat", "fork"):
        assert name in words(mshare, f"mshare {command} {name[:8]}", daemon.mount)
    assert words(mshare, f"mshare stat x{name}", daemon.mount) == []
    assert name in words(mshare, f"mshare --mount {daemon.mount} stat {name[:8]}")


def test_commands_are_offered(mshare: Mshare, daemon: Any) -> None:
    assert "heat" in words(mshare, "mshare he", daemon.mount)


def test_without_a_daemon_nothing_is_offered_and_nothing_said(mshare: Mshare, tmp_path: Path) -> None:
    assert words(mshare, "mshare stat ", tmp_path) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_it_can_read(cli: Mshare, shell: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("\n".join(cli("completion", shell).lines) + "\n")
    assert "_MSHARE_COMPLETE" in script.read_text()
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"no {shell} here to read its script")
    done = subprocess.run([found, "-n", str(script)], capture_output=True, check=False, env=dict(os.environ))
    assert (done.returncode, done.stderr) == (0, b"")


OF_BASH = 'COMP_WORDS=(mshare stat {0}); COMP_CWORD=2; _mshare_completion mshare; echo "${{COMPREPLY[@]}}"'
OF_ZSH = "words=(mshare stat {0}); CURRENT=3; _mshare_completion"
ZSH_AT_ITS_PROMPT = "compdef() {:}; compadd() {print -r -- $completions}\n"


@pytest.mark.parametrize(
    ("shell", "before", "ask"),
    [
        (("bash", "--norc"), "", OF_BASH),
        (("zsh", "-f"), ZSH_AT_ITS_PROMPT, OF_ZSH),
        (("fish", "--no-config"), "", "complete -C 'mshare stat {0}'"),
    ],
    ids=["bash", "zsh", "fish"],
)
def test_a_shell_completes_with_its_script(
    cli: Mshare,
    daemon: Any,
    client: Callable[..., Any],
    name: str,
    tmp_path: Path,
    eventually: Callable[[Callable[[], bool]], None],
    shell: tuple[str, str],
    before: str,
    ask: str,
) -> None:
    """As at the prompt: it runs the command that it completes, which asks the daemon, for a second at most."""
    client().do(f"r = mshare.mshare({name!r}, None, 2 << 20, CREATE)")
    kind, option = shell
    found = shutil.which(kind)
    if found is None:
        pytest.skip(f"no {kind} here to complete anything")
    script = "\n".join(cli("completion", kind).lines)
    here = tmp_path / "mshare"
    here.write_text(f"#!{sys.executable}\nimport sys\nsys.argv[0] = 'mshare'\nfrom mshare.cli import main\nmain()\n")
    here.chmod(0o755)
    env = {
        **os.environ,
        "MSHAREFS": str(daemon.mount),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    command = [found, option, "-c", f"{before}{script}\n{ask.format(name[:8])}"]

    def offered() -> bool:
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        return name in done.stdout.split()

    eventually(offered)
