"""mshare: named, shared pieces of address space for unmodified Linux.

>>> import mshare, os
>>> region = mshare.mshare("demo", None, 2 << 20, os.O_CREAT | os.O_RDWR)
>>> region.buf[:5] = b"hello"

Any other process that may open the name has the same memory at the same address after
``mshare.mshare("demo", None, 0, os.O_RDWR)``, until

>>> mshare.mshare_unlink("demo")
"""

from __future__ import annotations

from mshare.api import mshare, mshare_unlink, remove
from mshare.arena import Arena
from mshare.file_mapping import FileMapping, mmap
from mshare.odfork import odfork, set_odfork_default
from mshare.refpages import refpage_create
from mshare.region import Region
from mshare.shared_memory import ShareableList, SharedMemory, SharedMemoryManager
from msharefs.perms import MAP_REFPAGE, MAP_SHARED_PT
from msharefs.protocol import RegionStat, Vma
from msharefs.refpage import RefPage

__all__ = [
    "MAP_REFPAGE",
    "MAP_SHARED_PT",
    "Arena",
    "FileMapping",
    "RefPage",
    "Region",
    "RegionStat",
    "ShareableList",
    "SharedMemory",
    "SharedMemoryManager",
    "Vma",
    "mmap",
    "mshare",
    "mshare_unlink",
    "odfork",
    "refpage_create",
    "remove",
    "set_odfork_default",
]
