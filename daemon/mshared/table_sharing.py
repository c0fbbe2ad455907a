"""Whether the kernel can share the page tables of a region of huge pages, and with which windows not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from mshared.book import attachment_is, region_is
from mshared.live import LiveRegion
from msharefs.effects import Arm
from msharefs.region import BackingKind, Unshared
from msharefs.vma import Arming

_STORES_SEEN: Final = Arming.WP | Arming.WP_CLEAN


def note_arming(region: LiveRegion, effect: Arm) -> None:
    """Tables of memory that is write-protected in one process are its own from then on (hugetlb_unshare_pmds)."""
    if region.backing.kind is not BackingKind.HUGETLB or not effect.arming & _STORES_SEEN:
        return
    if region.model.unshared is None:
        why = f"stores to {effect.ar} have to be seen (read-only memory, a shared file, or a reference page)"
        region.model.unshared = Unshared(datetime.now(UTC).isoformat(timespec="seconds"), why)
        for attachment in region.model.attachments.values():
            attachment.own_tables |= not attachment.readonly
        region.note(region_is(region), *map(attachment_is, region.attachments))
    for attachment in region.model.attachments.values():
        attachment.own_tables |= not attachment.readonly


def note_sharing(region: LiveRegion) -> None:
    """Windows that come when no store has to be seen any more share tables again."""
    if region.model.unshared is not None and not any(arming & _STORES_SEEN for _, arming in region.model.mm.armings()):
        region.model.unshared = None
        region.note(region_is(region))
