"""A machine of one's own, as far as namespaces give one: for what documents have their readers do as root.

/run, /etc, /tmp, /var/log and /dev/shm are its own, and so are processes: what is started, mounted or installed in it
is gone when it ends, even if the tests are killed. Of the disk only this repository and /var/tmp can be written. The
kernel's settings (sysctl) are the real ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from documents import ROOT

PATIENCE = 180
SYSTEMD = "/usr/lib/systemd/systemd"
_SCENE = """
set -e
mount -t tmpfs -o mode=755 tmpfs /mnt
for place; do mkdir -p "/mnt/kept$place"; mount --rbind "$place" "/mnt/kept$place"; done
mount -t tmpfs -o mode=1777 tmpfs /tmp
for place; do mkdir -p "$place"; mount --rbind "/mnt/kept$place" "$place"; done
cp -a /etc /mnt/etc
mount --bind /mnt/etc /etc
for place in /run /var/log; do mount -t tmpfs -o mode=755 tmpfs $place; done
mount -t tmpfs -o mode=1777,size=100M tmpfs /dev/shm
mount -o remount,bind,ro /
mkdir -p -m 700 /run/user/0
echo ready
read -r _ || true
"""
"""What its first process does. Its arguments are directories that stay as they are."""
_MANAGER = f"""
mkdir -p /run/systemd/system  # It asks whether systemd runs here.
setsid {SYSTEMD} --user > manager.log 2>&1 &
for _ in $(seq 200); do systemctl --user is-system-running > /dev/null 2>&1 && exit 0; sleep 0.05; done
exit 1
"""
_SHELL = 'sudo() { "$@"; }\n'
"""Who runs in it is root: sudo would change nothing, and need not be installed."""


class OwnMachine:
    """Its commands run in ``checkout``, which has the files of this repository and the environment, as `.venv`.

    ``mount`` is where clients find the daemon, if that is not to be the machine's own.
    """

    def __init__(self, checkout: Path, mount: Path | None) -> None:
        self._checkout = checkout
        for path in ROOT.iterdir():
            if not path.name.startswith("."):
                (checkout / path.name).symlink_to(path)
        (checkout / ".venv").symlink_to(sys.prefix)
        self._env = _environment(checkout, mount)
        self._managed = False
        kept = [ROOT, Path(sys.prefix), Path("/var/tmp"), checkout, *([mount.parent] if mount else [])]
        unshare = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command = [*unshare, "bash", "-c", _SCENE, "bash", *map(str, kept)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        (self._first,) = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()

    def __enter__(self) -> OwnMachine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._managed:
            self.run("systemctl", "--user", "exit")  # Which takes away its control groups.
        self._process.communicate()  # Its first process reads the end of the file, and takes all others with it.

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        inside = ["nsenter", "-t", self._first, "-m", "-p", "env", "-C", str(self._checkout), *command]
        return subprocess.run(inside, env=self._env, capture_output=True, text=True, timeout=PATIENCE, check=False)

    def shell(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run lines as a shell does that ends at the first one that fails."""
        return self.run("bash", "-euo", "pipefail", "-c", _SHELL + script)

    def write(self, name: str, text: str) -> None:
        """Write a file into the checkout, and nothing through a link."""
        with open(self._checkout / name, "x") as file:
            file.write(text)

    def has_user_manager(self) -> bool:
        """Start ``systemd --user``; whether it runs."""
        self._managed = self.run("bash", "-c", _MANAGER).returncode == 0
        return self._managed


def _environment(checkout: Path, mount: Path | None) -> dict[str, str]:
    """What commands have in their environment: nothing of the tests' own, but one file of tests for `scripts/test`."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "MSHAREFS", "XDG_"))}
    if mount is not None:
        ours["MSHAREFS"] = str(mount)
    return ours | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(checkout),
        "XDG_RUNTIME_DIR": "/run/user/0",
        "MSHAREFS_VENV": sys.prefix,
        "PYTEST_ADDOPTS": "tests/core/test_addr.py",
    }
