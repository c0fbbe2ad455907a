"""Going on where a daemon ended that was killed, or stopped while somebody was attached.

Three things outlive a daemon: the memory (named files on its own mounts; an ordinary user's in the keeper), the
descriptors that it had (``mshared.keeper``), and what it knew (``mshared.journal``). Whatever changes is decided in the
model first, then written down in one entry: how the model is now, what is still to be done in memory, and what the
client is told. Only then is it done. So there are three cases for a change that was under way:

- It was not written down: it never was. The client, which has had no answer, asks again.
- It was, and memory is still to be moved: that is done now. Until the last such step nobody can touch the memory, since
  all windows were armed before the first, and each step may be taken twice.
- It was, and all memory is moved: windows may be armed as before or as after, so all are armed anew.

Of pages that forks have in common nothing is written down when one is brought to its region: what a region's own store
has is its own, whatever was said before. That a page was left to an heir is, before its owner may change it.

The steps: read the journal; have the old keeper send everything (``restore``); write a new journal that says where
everything is now; let the old keeper go; then move, arm and wake (``carry_on``). Killed before the new journal stands,
the next daemon does the same again; after that it has a journal and a keeper of its own.

Faults that the old daemon had read are not reported again, so whoever waits is woken, and faults once more. Where no
keeper is left, userfaultfds come from the processes themselves, which keep a copy (pidfd_getfd(2)); those of forked
children are lost then.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mshared import apply, comparing, donations, encoding, processes, reclaim, refusals
from mshared import records as rec
from mshared.backing import Backing, BackingStore
from mshared.family import Family
from mshared.files import let_go
from mshared.killpoints import point
from mshared.lifetimes import Lifetimes
from mshared.live import LiveAttachment, LiveRegion
from mshared.saved import Saved, SavedRegion
from mshared.service import Service
from mshared.snapshots import Untaken
from mshared.twin_parts import Taker
from mshared.uffd import Uffd, is_userfaultfd
from mshared.under_way import Staged, Unwritten
from msharefs import forking
from msharefs.addr import PAGE_SIZE, Address, AddrRange
from msharefs.host_mm import HostMm
from msharefs.lineage import Lineage
from msharefs.perms import PROT_RW, Credentials
from msharefs.pte import PteFlag, pte_flags
from msharefs.region import AttachmentId, Region, RegionId

log = logging.getLogger(__name__)


class Recovery:
    """Makes live regions of saved ones. ``kept`` are descriptors: from the numbers they had to those they have now."""

    def __init__(self, saved: Saved, kept: dict[int, int], service: Service, store: BackingStore) -> None:
        self._saved = saved
        self._kept = kept
        self._service = service
        self._lifetimes: Lifetimes = service.lifetimes
        self._store = store
        self._regions: dict[int, LiveRegion] = {}
        self._families: dict[int, tuple[Family, Lineage]] = {}
        self._ended: list[LiveRegion] = []

    def restore(self) -> None:
        """Have everything again in the model, with its descriptors; nothing is done to anybody yet."""
        in_order = sorted(self._saved.regions.values(), key=lambda each: each.last.layout.store)
        for saved in in_order:
            try:
                self._regions[saved.last.id] = self._region(saved)
            except OSError as error:
                log.error("region %s is lost: %s", saved.last.model.get("name"), error)  # noqa: TRY400
        for live in self._regions.values():
            self._fill_in(live, self._saved.regions[live.model.id])
        for _, lineage in self._families.values():
            forking.restore_protection(lineage)
        self._attach_all()
        self._restore_answers()

    def carry_on(self) -> None:
        """Move what was to be moved, arm every window as the model says, and wake who waits. Raises OSError."""
        regions = self._lifetimes.regions()
        read_events = self._lifetimes.read_events
        with _changing(regions):
            attachments = [attachment for live in regions for attachment in live.attachments]
            for fd, parent in reclaim.children(list(self._kept.values()), attachments, read_events):
                self._forget_kept(fd)
                self._lifetimes.inherit(parent, fd)
            for live in regions:
                for attachment in list(live.attachments):
                    refusals.take_back(attachment)
                self._finish_change(live)
                for attachment in list(live.attachments):
                    point()
                    apply.arm_anew(attachment, read_events)
                apply.carry_out(live, [], read_events)
        point()
        for live in regions:
            for attachment in list(live.attachments):
                apply.wake_all(attachment)
        self._settle_all(regions)

    def _forget_kept(self, fd: int) -> None:
        self._kept = {theirs: ours for theirs, ours in self._kept.items() if ours != fd}

    def _settle_all(self, regions: Iterable[LiveRegion]) -> None:
        """Let go what has ended, now that the journal tells of what has not."""
        for live in regions:
            if live in self._ended:
                self._lifetimes.forget(live)
            else:
                self._settle(live)
        for family, _ in self._families.values():
            family.release_ended()
        backings = [live.backing for live in self._lifetimes.book.regions.values()]
        self._store.sweep(place for each in backings for place in (each.path, each.mount) if place is not None)
        self._service.snapshots.forget_orphans()
        for fd in self._kept.values():
            let_go(fd, magic=0)
        self._kept = {}

    def _take(self, fd: int | None) -> int | None:
        return None if fd is None else self._kept.pop(fd, None)

    def _region(self, saved: SavedRegion) -> LiveRegion:
        """A region without its pages. Raises OSError when its memory is gone."""
        last, layout = saved.last, saved.last.layout
        fields = encoding.structured_fields(last.model)
        made = self._backing(last)
        family, lineage = self._families.setdefault(layout.family, (Family(layout.family), Lineage()))
        mm = HostMm(
            layout.ar,
            levels=layout.levels,
            page=layout.page,
            granule=layout.granule,
            paging_all=layout.paging_all,
            hole_signal=layout.hole_signal,
            lineage=lineage,
            store=layout.store,
        )
        mm.vmas = saved.vmas
        mm.rule = mm.rule.with_forks(layout.forked)
        model = Region(mm=mm, **fields)
        live = LiveRegion(
            model,
            made,
            self._lifetimes.uffd_device,
            family,
            created_ns=last.created_ns,
            book=self._lifetimes.book,
            journal=self._lifetimes.journal,
        )
        self._lifetimes.book.regions[last.id] = live
        if last.over:
            family.restore_ended(live)
            return live
        self._restore_files(live, saved)
        return live

    def _backing(self, last: rec.RegionIs) -> Backing:
        memory = last.memory
        kept = {fd: self._take(fd) for fd in {memory.fd, memory.writable, memory.readonly}}
        fd, writable, readonly = kept[memory.fd], kept[memory.writable], kept[memory.readonly]
        path, mount = (None if each is None else Path(each) for each in (memory.path, memory.mount))
        if fd is not None and writable is not None and readonly is not None:
            return Backing(fd, writable, readonly, path, last.kind, memory.start, mount)
        if path is None:
            raise FileNotFoundError(errno.ENOENT, "nobody has kept its memory")
        return self._store.reopen(path, last.kind, mount)

    def _restore_files(self, live: LiveRegion, saved: SavedRegion) -> None:
        stash = self._take(saved.last.memory.stash)
        if stash is not None:
            live.restore_stash(stash)
        elif saved.last.memory.stash is not None:
            raise FileNotFoundError(errno.ENOENT, "nobody has kept what is hidden by PROT_NONE")
        for number, file in saved.files.items():
            fd = self._take(file.fd)
            if fd is None:
                log.error("region %s: nobody has kept %s, which is mapped", live.model.name, file.path)
                fd = os.memfd_create("lost")
            live.restore_file(number, fd, file.magic)
        for piece in saved.aside.values():
            fd = self._take(piece.fd)
            if fd is not None:
                live.restore_aside(Unwritten(piece.number, fd, piece.offset, piece.data, piece.magic))
        sponsor = self._take(saved.last.sponsor)
        if live.model.kept and sponsor is not None:
            self._lifetimes.sponsors.keep(live, [sponsor])
        else:
            live.model.kept = False
        self._service.files.restore(live)
        live.poisoned |= saved.poisoned
        live.change, live.steps = saved.change, saved.steps

    def _fill_in(self, live: LiveRegion, saved: SavedRegion) -> None:
        """What is installed, as far as that is more than the kernel says when it is asked."""
        mm = live.model.mm
        if live.closed or not (mm.rule.forked or saved.foreign or any(vma.source is not None for vma in mm.vmas)):
            return
        inside = live.held(AddrRange.sized(0, mm.ar.size))
        if any(vma.file is not None and vma.file.compared for vma in mm.vmas):
            live.digests = comparing.restored(self._take(saved.last.memory.digests), inside)
        forking.restore_pages(mm, [part.moved(mm.ar.start) for part in inside], saved.foreign)
        for run in saved.dirty:
            for vma in filter(lambda vma: vma.reaches_file, mm.vmas.overlapping(run)):
                mm.enter(vma.clipped(run).ar, pte_flags(PROT_RW) | PteFlag.DIRTY)
        mm.unsure = [run for vma in mm.vmas if vma.refpage is not None for run in mm.table.present(vma.ar)]

    def _attach_all(self) -> None:
        """Attachments whose process and window are there still, and the namespace with all regions."""
        gone = dict(self._saved.gone)
        found: dict[int, list[LiveAttachment]] = {number: [] for number in self._regions}
        for saved in self._saved.attachments.values():
            live = self._regions.get(saved.region)
            attachment = self._attachment(saved, live) if live is not None and not live.closed else None
            if attachment is not None:
                found[saved.region].append(attachment)
            else:
                gone[saved.model.id] = saved.region
        self._lifetimes.gone.update({each: self._regions[number] for each, number in gone.items() if number in found})
        for live in self._regions.values():
            for attachment in found[live.model.id]:
                live.model.attachments[attachment.model.id] = attachment.model
        waiting = self._restore_untaken()
        living = [live for live in self._regions.values() if not live.closed]
        for live in living:
            if live.model.transient and not live.model.kept and not found[live.model.id]:
                live.model.name = None
        kept = [live for live in living if live.model.name is not None or found[live.model.id] or live in waiting]
        counters = RegionId(self._saved.next_region), AttachmentId(self._saved.next_attachment)
        self._service.namespace.restore([live.model for live in kept], counters)
        for live in living:
            self._lifetimes.restore(live, found[live.model.id])
        self._ended = [live for live in living if live not in kept]

    def _attachment(self, saved: rec.AttachmentIs, live: LiveRegion) -> LiveAttachment | None:
        """An attachment that is there still."""
        pid, anchor = saved.model.pid, AddrRange.sized(saved.anchor, PAGE_SIZE)
        fd, sigbus = self._take(saved.uffd), self._take(saved.sigbus)
        if pid is not None and processes.start_time(pid) != saved.started:
            gone = True
        else:
            fd = reclaim.from_process(pid, anchor) if fd is None and pid is not None else fd
            gone = (
                fd is None
                or not is_userfaultfd(fd)
                or not Uffd(fd).is_alive()
                or not reclaim.has_anchor(Uffd(fd), anchor)
            )
        if gone or fd is None:
            for each in (fd, sigbus):
                if each is not None:
                    os.close(each)
            return None
        os.set_blocking(fd, False)
        denier = None if sigbus is None else Uffd(sigbus)
        found = LiveAttachment(saved.model, live, Uffd(fd), Address(saved.anchor), saved.parent_pid, sigbus=denier)
        found.started, found.uid, found.unarmed = saved.started, saved.uid, saved.unarmed
        found.poisoned.update(map(Address, saved.poisoned))
        found.refused.update((Address(page), 0.0) for page in saved.refused)
        found.staged = [Staged(ar, Address(addr)) for ar, addr in saved.staged]
        return found

    def _restore_untaken(self) -> list[LiveRegion]:
        """Twins that wait for their child; the regions."""
        waiting = []
        for token, each in self._saved.untaken.items():
            live = self._regions.get(each.region)
            if live is not None and not live.closed:
                who = Credentials(each.uid, each.gid, frozenset(each.groups))
                taker = Taker(token, each.readonly, who, each.maker, each.started)
                self._service.snapshots.restore(Untaken(live, taker))
                waiting.append(live)
        return waiting

    def _restore_answers(self) -> None:
        for session, answer in self._saved.answers.items():
            if processes.start_time(answer.pid) == answer.started:
                self._lifetimes.book.answers[session] = answer

    def _finish_change(self, live: LiveRegion) -> None:
        if live.change is not None:
            log.info("region %s: a change goes on that was under way", live.model.name)
            apply.carry_out(live, live.change.effects, self._lifetimes.read_events, resume=True)

    def _settle(self, live: LiveRegion) -> None:
        """Undo what its creator had not completed; have files brought up to date that nobody else will see to."""
        if not live.model.ready:
            donations.undo(live, self._lifetimes.read_events)
            for attachment in list(live.attachments):
                self._lifetimes.drop(attachment)
            if not live.ended:
                self._service.namespace.abandon(live.model)
                self._lifetimes.forget(live)
        elif live.unwritten or not live.attachments:
            self._lifetimes.settling.request(live)


@contextlib.contextmanager
def _changing(regions: Iterable[LiveRegion]) -> Iterator[None]:
    """Decide no fault of these regions, whatever is read meanwhile."""
    found = list(regions)
    for live in found:
        live.changing = True
    try:
        yield
    finally:
        for live in found:
            live.changing = False
