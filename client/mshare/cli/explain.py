"""mshare explain: what an error or a signal means here, what to do, and which one it was."""

from __future__ import annotations

import errno
import re
import signal
from pathlib import Path
from typing import Final

import attrs
import click

from mshare.cli import render
from mshare.cli.faults import fault_row, refused
from mshare.cli.place import served_mount
from msharefs.protocol import Refusal

_SHOWN: Final = 5


@attrs.frozen
class Meaning:
    """What an error or signal means here, and what to do about it."""

    name: str
    means: str
    cure: str


def _meanings(*lines: tuple[str, str, str]) -> dict[str, Meaning]:
    return {name: Meaning(name, means, cure) for name, means, cure in lines}


MEANINGS: Final = _meanings(
    (
        "SIGBUS",
        "A thread touched a part of a region where there is no memory to be had: a hole, which nobody has mapped or "
        "somebody has unmapped (for everybody); a page behind the end of a mapped file; or a page for which memory, or "
        "huge pages, ran out.",
        "A hole: look at `mshare maps NAME`, and map something there with Region.mmap. A file: make it longer before "
        "it is touched there. Memory: free some, or raise vm.nr_hugepages; `mshare create --populate` fails early.",
    ),
    (
        "SIGSEGV",
        "A thread touched a part of a region in a way that its protection forbids: a store into read-only memory, or "
        "any touch of PROT_NONE. Protection is that of the region, for all processes: another one may have set it. A "
        "window that was opened with O_RDONLY cannot be stored to at all.",
        "Look at `mshare maps NAME`. Change it with Region.mprotect; open the region with os.O_RDWR to store.",
    ),
    (
        "EFAULT",
        "A system call was given memory of a region that it may not touch: what would be a SIGBUS or SIGSEGV is an "
        "error there. Or the daemon runs without /dev/userfaultfd, and then it is so for all paged memory.",
        "As for SIGBUS and SIGSEGV. Until the page is mapped or protected anew, each touch of it by this process is a "
        "SIGBUS. For a daemon without root: touch the memory before the call.",
    ),
    (
        "SIGKILL",
        "A system call stored into read-only memory of a region, and the kernel could not be made to refuse it.",
        "Make the memory writable before the call, with Region.mprotect, or give the call another buffer.",
    ),
    (
        "EINVAL",
        "An address, size or offset is not a multiple of what is needed (`head -1 MOUNT/mshare_info`, 1 GiB for "
        "hugetlb), lies outside the region or the window 0x200000000000-0x400000000000, or the range is in use in "
        "this process.",
        "Take sizes in multiples of 2 MiB. Let the daemon choose the address (addr=None). To attach twice in one "
        "process, give the second another address.",
    ),
    (
        "ENOENT",
        "There is no region of that name, or no daemon has mounted anything.",
        "`mshare ls` lists regions. os.O_CREAT makes one. `mshare up` starts a daemon; MSHAREFS names its mount.",
    ),
    ("EEXIST", "There is a region of that name already.", "Leave out os.O_EXCL to attach to it, or `mshare rm` it."),
    (
        "EACCES",
        "The mode of the region's file does not let you open it so, or PROT_EXEC was asked for: regions are data.",
        "`ls -l` in the mount shows owner and mode; the owner can chmod and chown it. Open it O_RDONLY to read.",
    ),
    (
        "EPERM",
        "Files in the mount come and go through mshare only; rm, mv, truncate and write are refused there.",
        "`mshare create`, `mshare unlink` and `mshare rm`; or the same calls of the module.",
    ),
    (
        "EBUSY",
        "Others are attached to the region, and you are not: mshare_unlink ends your own access, not theirs.",
        "`mshare rm NAME` takes the name away at once; the memory goes with its last user.",
    ),
    (
        "ENOMEM",
        "Too little memory, or too few free huge pages for what is to be mapped in a hugetlb region.",
        "Raise vm.nr_hugepages, or start the daemon with --hugetlb-pool; or take a smaller size or another backing.",
    ),
    (
        "ENOSPC",
        "The daemon has as many regions, or as many bytes of them, as it may (--max-regions, --max-bytes).",
        "`mshare ls --sort size` shows what is there; remove some, or start the daemon with higher limits.",
    ),
    (
        "EDQUOT",
        "Your user has as many regions, or bytes, as one user may.",
        "Remove some of your own, or ask who runs the daemon for higher limits.",
    ),
    (
        "EAGAIN",
        "The region is just being made by somebody else, who has not finished yet.",
        "Try again; the module does so by itself for a while.",
    ),
    (
        "ENODEV",
        "A file was mapped with mmap(2) that cannot be: files in the mount are names, not memory.",
        "Attach with mshare.mshare(name, None, 0, os.O_RDWR), and use region.buf.",
    ),
    (
        "ENOTCONN",
        "The daemon that made this mount is dead. Attached processes keep their memory.",
        "`mshare up` replaces the mount; the log, by default /var/log/mshared.log, may say why it ended.",
    ),
    (
        "ECONNREFUSED",
        "Nobody listens on the daemon's socket: it is dead, or was never started.",
        "`mshare up`; see the log, by default /var/log/mshared.log.",
    ),
    (
        "EMFILE",
        "A process has as many open files as it may; an attachment takes three in the daemon.",
        "Raise `ulimit -n`, or LimitNOFILE= of the service.",
    ),
    (
        "EIO",
        "Something that the daemon did not expect, or a mapped file that could not be read or written.",
        "Its log has the details.",
    ),
    (
        "EPROTO",
        "Client and daemon do not understand each other: they are of different versions.",
        "Install the same version for both, and start the daemon again.",
    ),
)


@click.command(context_settings={"ignore_unknown_options": True})  # -7 is none.
@click.argument("what", metavar="ERRNO|SIGNAL")
@render.json_option
@click.pass_obj
def explain(mount: Path | None, what: str, *, as_json: bool) -> None:
    """Say what an error or signal means where regions are concerned, and what to do about it.

    By name or number: EINVAL, 22, SIGBUS, BUS. A number is taken for an errno; -7 and 135, as a shell or subprocess
    tells it, for a signal. For signals, and EFAULT, the last ones that the daemon sent follow: of which region, at
    which offset, and what was mapped there.
    """
    name = name_of(what)
    meaning = MEANINGS.get(name)
    if meaning is None:
        known = ", ".join(MEANINGS)
        raise click.BadParameter(f"{what!r} is nothing that regions answer with: {known}", param_hint="ERRNO|SIGNAL")
    found = _last(mount, name)
    if as_json:
        render.print_json({**attrs.asdict(meaning), "last": [attrs.asdict(refusal) for refusal in found]})
        return
    click.echo(f"{render.styled(meaning.name, bold=True)}: {meaning.means}\n\nCure: {meaning.cure}")
    if found:
        click.echo("\nThe last:")
        for refusal in found:
            click.echo(f"  {_sentence(refusal)}")


def name_of(what: str) -> str:
    """The name of an error or signal, however it was written."""
    text = what.strip().upper()
    if text in MEANINGS:
        return text
    if f"SIG{text}" in MEANINGS:
        return f"SIG{text}"
    if re.fullmatch(r"-?[0-9]{1,4}", text):
        number = int(text)
        signal_number = -number if number < 0 else number - 128
        if number < 0 or number > 128:
            return signal.Signals(signal_number).name if signal_number in set(signal.Signals) else text
        return errno.errorcode.get(number, text)
    return text


def _last(mount: Path | None, name: str) -> list[Refusal]:
    """The last refusals by which that was sent, if there is a daemon to ask."""
    try:
        return [refusal for refusal in refused(served_mount(mount)) if refusal.sent == name][-_SHOWN:]
    except OSError:
        return []


def _sentence(refusal: Refusal) -> str:
    when, region, offset, access, _, pid, tid, reason = fault_row(refusal)
    return f"{when} {region}, pid {pid} thread {tid}: {access} at offset {offset}: {reason}"
