"""Filling memory from reference pages: a piece at once, out of a buffer that holds the pattern many times over.

Before a clean page comes, all processes have it protected: who stores to it is reported then, whoever it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Final
from weakref import WeakKeyDictionary

from mshared import files, refusals
from mshared.crowd import do_for_all
from mshared.live import LiveAttachment, LiveRegion
from mshared.uffd import Outcome, attempt, outcome_of
from msharefs import clean_pages
from msharefs.addr import PMD_SIZE, Address, AddrRange
from msharefs.effects import FillPattern, Signal
from msharefs.perms import Access
from msharefs.refpage import RefPage
from msharefs.region import BackingKind
from msharefs.streams import MOST

log = logging.getLogger(__name__)

_MOST_BUFFERS: Final = 4
_buffers: WeakKeyDictionary[RefPage, files.Buffer] = WeakKeyDictionary()
"""Of the patterns that were needed last; none outlives the last mapping of its pattern."""


def answer(attachment: LiveAttachment, addr: Address, tid: int, effect: FillPattern) -> Outcome:
    """Have the pages of ``effect`` appear, as far as nothing is there; without memory the thread gets a SIGBUS."""
    region = attachment.region
    others = [each for each in region.attachments if each is not attachment]
    if effect.clean and not _protected(others, effect.ar):
        return Outcome.RETRY
    outcome = Outcome.EXISTS
    if not attachment.model.readonly:  # A private mapping: what is put there is not the region's.
        if _fill_whole(region, effect):
            return attempt(attachment, partial(attachment.uffd.wake, attachment.guest(effect.ar)))
        outcome = _copy(attachment, effect)
        if outcome is Outcome.SERVED:
            _copy_ahead(attachment, effect)
    if outcome in (Outcome.EXISTS, Outcome.UNMAPPED):
        return _fill_one(attachment, addr, tid, effect)
    return outcome


def _copy(attachment: LiveAttachment, effect: FillPattern) -> Outcome:
    """By the window of who waits: that maps the pages, too."""
    source = _buffer(effect.refpage).address
    try:
        size = attachment.uffd.copy_some(attachment.guest(effect.ar), source, protected=effect.clean)
    except OSError as error:
        return outcome_of(attachment, error)
    clean_pages.came(attachment.region.model.mm, AddrRange.sized(effect.ar.start, size), clean=effect.clean)
    return Outcome.SERVED


def _copy_ahead(attachment: LiveAttachment, effect: FillPattern) -> None:
    """The same, for pages that nobody waits for yet, as long as they can come.

    From the last one on: who goes on meanwhile then waits for the next one once, instead of for each in turn.
    """
    source = _buffer(effect.refpage).address
    for page in reversed(effect.ahead):
        try:
            attachment.uffd.copy_from(attachment.guest(page), source)
        except OSError as error:
            if outcome_of(attachment, error) is not Outcome.EXISTS:
                return
        else:
            clean_pages.came(attachment.region.model.mm, page, clean=False)


def _fill_whole(region: LiveRegion, effect: FillPattern) -> bool:
    """By the file, if that makes a huge page: one written to anyhow, of which nothing is there."""
    ar = effect.ar
    if region.backing.kind is not BackingKind.THP or effect.clean or ar.size != PMD_SIZE or not ar.is_aligned(PMD_SIZE):
        return False
    offset = region.model.offset_of(ar)
    try:
        if not region.backing.is_empty(AddrRange.sized(offset, ar.size)):
            return False
        region.backing.write(_buffer(effect.refpage).view, offset)
    except OSError as error:
        log.debug("region %s: no huge page: %s", region.model.name, error.strerror)
        return False
    clean_pages.came(region.model.mm, ar, clean=False, huge=True)
    return True


def _fill_one(attachment: LiveAttachment, addr: Address, tid: int, effect: FillPattern) -> Outcome:
    """The first page, by the file, unless it is there: whoever waits finds it when trying again."""
    region = attachment.region
    page = AddrRange.sized(effect.ar.start, region.model.mm.page)
    if effect.clean and not _protected([attachment], page):
        return Outcome.RETRY
    try:
        if region.filler().copy(region.model.offset_of(page), effect.refpage.repeated(page.size)):
            clean_pages.came(region.model.mm, page, clean=effect.clean)
    except OSError as error:
        log.warning("%s: no memory for a page at %#x: %s", attachment, addr, error.strerror)
        access = Access.READ if effect.clean else Access.WRITE
        return refusals.refuse(attachment, addr, tid, Signal.SIGBUS, access=access)
    return attempt(attachment, partial(attachment.uffd.wake, attachment.guest(page)))


def _protected(attachments: Sequence[LiveAttachment], ar: AddrRange) -> bool:
    """Protect a range in all that may store; False when one is being forked, which is to be read first."""
    forking: list[LiveAttachment] = []

    def protect(attachment: LiveAttachment) -> None:
        outcomes = [attempt(attachment, partial(attachment.uffd.write_protect, at)) for at in attachment.places(ar)]
        if Outcome.RETRY in outcomes:
            forking.append(attachment)

    do_for_all([each for each in attachments if not each.model.readonly], protect)
    return not forking


def _buffer(refpage: RefPage) -> files.Buffer:
    found = _buffers.get(refpage)
    if found is None:
        while len(_buffers) >= _MOST_BUFFERS:
            del _buffers[next(iter(_buffers))]
        found = _buffers[refpage] = files.Buffer(MOST)
        found.view[:] = refpage.repeated(MOST)
    return found
