"""mshare doctor: what this machine has and lacks for mshared, and the cure for each lack.

Each check takes the facts and returns what it found; none looks at the machine itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from mshare.cli import fix as fixing
from mshare.cli import render
from mshare.cli.findings import Finding, Level
from mshare.cli.machine import Machine, read_machine
from mshare.discovery import HOW_TO_START
from msharefs.uffd_abi import Feature

_OLDEST_KERNEL: Final = (6, 1)
_NEEDED: Final = (Feature.THREAD_ID, Feature.EXACT_ADDRESS, Feature.MISSING_SHMEM, Feature.WP_HUGETLBFS_SHMEM)
_CAPABILITIES: Final = {"SYS_ADMIN": 21, "SYS_PTRACE": 19}
"""To mount, and to be told of forks."""
_LANDLOCK_WITH_TRUNCATE: Final = 3
_DESCRIPTORS_AN_ATTACHMENT: Final = 3
_DEFAULT_MAP_COUNT: Final = 65530


@click.command()
@click.option(
    "--fix", is_flag=True, help="Tell which commands would cure each lack; root is asked whether to run them."
)
@click.option("--yes", is_flag=True, help="With --fix, as root: run them without asking.")
@render.json_option
@click.pass_context
def doctor(context: click.Context, *, fix: bool, yes: bool, as_json: bool) -> None:
    """Say what this machine has and lacks for mshared, with a cure for each lack.

    Judged for you: what a daemon run by this user needs. Exit status 1 if something is missing without which it
    cannot run (with --fix: is missing still); a note is something that works less well, or is good to know.
    """
    mount: Path | None = context.obj
    if yes and not fix:
        raise click.UsageError("--yes is for --fix")
    if fix and as_json:
        raise click.UsageError("--fix talks to people, --json to programs")
    machine = read_machine(mount)
    findings = examine(machine)
    if fix and fixing.fix(machine, findings, yes=yes):
        findings = examine(read_machine(mount))
    if as_json:
        render.print_json(findings)
    else:
        _print(findings)
    if any(finding.level is Level.LACK for finding in findings):
        context.exit(1)


def examine(machine: Machine) -> list[Finding]:
    """All checks, in the order in which one would mend things."""
    findings = [check(machine) for check in _CHECKS]
    return [finding for finding in findings if finding is not None]


def check_kernel(machine: Machine) -> Finding:
    """Linux 6.1 for what userfaultfd must do, x86-64 for the system call numbers."""
    found = f"Linux {machine.kernel} {machine.architecture}"
    version = re.match(r"(\d+)\.(\d+)", machine.kernel)
    if machine.architecture != "x86_64":
        return Finding("kernel", Level.LACK, found, "msharefs runs on x86-64 only so far")
    if version is None or (int(version[1]), int(version[2])) < _OLDEST_KERNEL:
        return Finding("kernel", Level.LACK, found, "boot Linux 6.1 or later")
    return Finding("kernel", Level.OK, found)


def check_capabilities(machine: Machine) -> Finding | None:
    """Root in a container may lack what root needs to mount and to see forks."""
    if not machine.root:
        return None
    missing = [name for name, bit in _CAPABILITIES.items() if not machine.capabilities >> bit & 1]
    if not missing:
        return Finding("capabilities", Level.OK, " ".join(_CAPABILITIES))
    level = Level.LACK if "SYS_ADMIN" in missing else Level.NOTE
    cure = f"start the container with {' '.join(f'--cap-add {name}' for name in missing)}"
    return Finding("capabilities", level, f"root lacks {' '.join(missing)}", cure)


def check_fuse(machine: Machine) -> Finding:
    """The device every FUSE server needs."""
    if machine.fuse:
        cure = "`modprobe fuse`; in a container, start it with --device /dev/fuse"
        return Finding("fuse", Level.LACK, f"/dev/fuse: {machine.fuse}", cure)
    return Finding("fuse", Level.OK, "/dev/fuse")


def check_fusermount(machine: Machine) -> Finding:
    """Only users other than root need fusermount3."""
    if not machine.fusermount:
        return Finding("fusermount3", Level.OK, "set-uid root")
    cure = "install the package fuse3 (`apt-get install fuse3`)"
    return Finding("fusermount3", Level.NOTE if machine.root else Level.LACK, machine.fusermount, cure)


def check_userfaultfd(machine: Machine) -> Finding:
    """The device is best; the system call in user mode does, with less."""
    uffd = machine.userfaultfd
    if uffd.features is None:
        return Finding("userfaultfd", Level.LACK, "none", "a kernel with CONFIG_USERFAULTFD; in a container, allow it")
    if not uffd.device:
        return Finding("userfaultfd", Level.OK, "/dev/userfaultfd")
    cure = "`mknod /dev/userfaultfd c 10 $(awk '/userfaultfd/{print $1}' /proc/misc)`, Linux 6.1 or later"
    if not machine.root:
        cure = "attach to a daemon run by root: it hands the device to its clients"
    found = (
        f"/dev/userfaultfd: {uffd.device}; by system call, user mode only (vm.unprivileged_userfaultfd is "
        f"{uffd.sysctl}): a read(2) into missing paged memory gives EFAULT, forks are not reported"
    )
    return Finding("userfaultfd", Level.NOTE, found, cure)


def check_features(machine: Machine) -> Finding | None:
    """What this kernel's userfaultfd can report."""
    features = machine.userfaultfd.features
    if features is None:
        return None
    missing = [feature.name or "" for feature in _NEEDED if not features & feature]
    if missing:
        return Finding("features", Level.LACK, f"userfaultfd lacks {' '.join(missing)}", "boot Linux 6.1 or later")
    if not features & Feature.EVENT_FORK:
        found = "userfaultfd lacks EVENT_FORK: a forked child arms its own windows"
        return Finding("features", Level.NOTE, found, "a kernel with all of userfaultfd")
    if not features & Feature.POISON:
        found = "userfaultfd lacks POISON: a thread that blocks SIGBUS and touches a hole waits until it is killed"
        return Finding("features", Level.NOTE, found, "Linux 6.6 or later")
    return Finding("features", Level.OK, f"{' '.join(f.name or '' for f in (*_NEEDED, Feature.EVENT_FORK))} POISON")


def check_huge_pages(machine: Machine) -> Finding:
    """A daemon run by root mounts its tmpfs with huge=always."""
    if machine.thp:
        return Finding("huge pages", Level.OK, "transparent ones for tmpfs (huge=always)")
    found = "no transparent ones: the default backing is 4k"
    return Finding("huge pages", Level.NOTE, found, "a kernel with CONFIG_TRANSPARENT_HUGEPAGE")


def check_hugetlb(machine: Machine) -> Finding:
    """Only the hugetlb backing needs reserved pages."""
    if machine.hugetlb_pages is None:
        return Finding("hugetlb", Level.NOTE, "no pages of 2 MiB", "a kernel with CONFIG_HUGETLBFS, for that backing")
    reserved, free = machine.hugetlb_pages
    if not reserved:
        cure = "for the hugetlb backing: `sysctl vm.nr_hugepages=N`, N pages of 2 MiB"
        return Finding("hugetlb", Level.NOTE, "no pages reserved", cure)
    return Finding("hugetlb", Level.OK, f"{reserved} pages of 2 MiB reserved, {free} free")


def check_landlock(machine: Machine) -> Finding:
    """It takes the right to truncate from descriptors; sealed memfds, of a daemon without root, need no such thing."""
    found = f"ABI {machine.landlock}" if machine.landlock else "none"
    if machine.landlock >= _LANDLOCK_WITH_TRUNCATE or not machine.root:
        return Finding("landlock", Level.OK, found if machine.landlock else "none, and not needed without root")
    cure = "Linux 6.2 or later with lsm=landlock,... on its command line"
    return Finding("landlock", Level.NOTE, f"{found}: who may write a region can also truncate its memory", cure)


def check_installed(machine: Machine) -> Finding:
    """The libraries of the daemon; the client does without."""
    missing = list(machine.missing_modules)
    if missing:
        found = f"{' and '.join(missing)} missing, which mshared needs"
        cure = "`apt-get install libfuse3-dev pkg-config gcc python3-dev`, then `pip install 'msharefs[daemon]'`"
        return Finding("daemon", Level.LACK, found, cure)
    if not machine.libfuse:
        return Finding("daemon", Level.LACK, "no libfuse3, which mshared needs", "`apt-get install libfuse3-3`")
    return Finding("daemon", Level.OK, "libfuse3, pyfuse3, trio")


def check_runtime_directory(machine: Machine) -> Finding | None:
    """Where a user's daemon mounts by default."""
    if machine.root:
        return None
    if machine.runtime_directory:
        return Finding("runtime directory", Level.OK, machine.runtime_directory)
    cure = "log in with a session (`loginctl enable-linger`), or start mshared with --mount and --state-dir"
    return Finding("runtime directory", Level.LACK, "XDG_RUNTIME_DIR is not set", cure)


def check_serving(machine: Machine) -> Finding:
    """Whether commands and programs would find a daemon now."""
    daemon = machine.daemon
    if daemon.hangs:
        cure = "look into its log; `mshare down`, or kill -9, then `mshare up`"
        return Finding("mount", Level.NOTE, f"the daemon of {daemon.mount} does not answer", cure)
    if daemon.trouble:
        return Finding("mount", Level.NOTE, daemon.trouble.removesuffix(f"; {HOW_TO_START}"), HOW_TO_START)
    return Finding("mount", Level.OK, f"{daemon.mount}, regions: {daemon.regions}")


def check_open_files(machine: Machine) -> Finding:
    """The daemon raises its soft limit to the hard one and needs three descriptors an attachment."""
    soft, hard = machine.open_files
    if hard < 0:
        return Finding("open files", Level.OK, "no limit")
    found = f"at most {hard} (soft {soft}): about {hard // _DESCRIPTORS_AN_ATTACHMENT} attachments"
    if hard < 4096:
        return Finding("open files", Level.NOTE, found, "raise `ulimit -Hn`, or LimitNOFILE= of the service")
    return Finding("open files", Level.OK, found)


def check_map_count(machine: Machine) -> Finding | None:
    """Each range that is armed on its own splits a mapping of the client."""
    count = machine.max_map_count
    if count is None:
        return None
    if count < _DEFAULT_MAP_COUNT:
        return Finding("map count", Level.NOTE, f"{count} mappings a process", "`sysctl vm.max_map_count=65530`")
    return Finding("map count", Level.OK, f"{count} mappings a process")


_CHECKS: Final[tuple[Callable[[Machine], Finding | None], ...]] = (
    check_kernel,
    check_capabilities,
    check_fuse,
    check_fusermount,
    check_userfaultfd,
    check_features,
    check_huge_pages,
    check_hugetlb,
    check_landlock,
    check_installed,
    check_runtime_directory,
    check_serving,
    check_open_files,
    check_map_count,
)
_COLOURS: Final = {Level.OK: "green", Level.NOTE: "yellow", Level.LACK: "red"}


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        level = render.styled(f"{finding.level:<4}", fg=_COLOURS[finding.level])
        click.echo(f"{level}  {finding.name:<{width}}  {render.printable(finding.found)}")
        if finding.cure:
            click.echo(f"{'':{width + 8}}cure: {finding.cure}")
