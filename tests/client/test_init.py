"""The facade: what ``import mshare`` gives, and no more."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types

import mshare
from msharefs import perms, protocol

FUNCTIONS = {"mmap", "mshare", "mshare_unlink", "odfork", "refpage_create", "remove", "set_odfork_default"}
CLASSES = {
    "Arena",
    "FileMapping",
    "RefPage",
    "Region",
    "RegionStat",
    "ShareableList",
    "SharedMemory",
    "SharedMemoryManager",
    "Vma",
}
FLAGS = {"MAP_SHARED_PT": 0x200000, "MAP_REFPAGE": 0x400000}


def test_all_of_it_is_there_once() -> None:
    names = set(mshare.__all__)
    assert names == FUNCTIONS | CLASSES | FLAGS.keys()
    assert [name for name in mshare.__all__ if not hasattr(mshare, name)] == []
    assert len(mshare.__all__) == len(names)


def test_nothing_else_looks_as_if_it_were() -> None:
    public = {
        name
        for name, value in vars(mshare).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert public == set(mshare.__all__)


def test_functions_hide_the_modules_of_their_names() -> None:
    """``mshare.mshare`` is the call of the series."""
    for name in FUNCTIONS:
        assert inspect.isfunction(getattr(mshare, name))
    assert mshare.RegionStat is protocol.RegionStat
    assert mshare.Vma is protocol.Vma
    assert {name: getattr(mshare, name) for name in FLAGS} == FLAGS
    assert mshare.MAP_REFPAGE == perms.MAP_REFPAGE


def test_arguments_have_the_names_and_defaults_that_are_fixed() -> None:
    expected = {
        mshare.mshare: "(name, addr, length, oflags, mode=384, *, backing=None, empty=False, mount=None)",
        mshare.mshare_unlink: "(name, *, mount=None)",
        mshare.remove: "(name, *, mount=None)",
        mshare.odfork: "(*regions)",
        mshare.set_odfork_default: "(enabled)",
        mshare.mmap: "(fd, length, *, addr=None, prot=3, flags=2097153, offset=0, backing=None, mount=None)",
        mshare.FileMapping.munmap: "(self, offset=0, length=None)",
        mshare.FileMapping.mprotect: "(self, prot)",
        mshare.FileMapping.msync: "(self)",
        mshare.Region.fork: "(self, name, mode=384)",
        mshare.Region.munmap: "(self, offset, length)",
        mshare.Region.mprotect: "(self, offset, length, prot)",
        mshare.Region.madvise: "(self, offset, length, advice)",
        mshare.Region.stat: "(self)",
        mshare.Region.maps: "(self)",
        mshare.Region.detach: "(self)",
        mshare.SharedMemory.__init__: "(self, name=None, create=False, size=0, *, track=True, reserve=True,"
        " backing=None, mount=None)",
    }
    for function, text in expected.items():
        signature = inspect.signature(function)
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        found = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        assert str(found) == text, function.__qualname__
    mmap = inspect.signature(mshare.Region.mmap).parameters
    assert list(mmap)[:4] == ["self", "length", "prot", "flags"]
    assert (mmap["prot"].default, mmap["flags"].default, mmap["offset"].default) == (3, 0x21, None)


def test_everything_public_says_what_it_is() -> None:
    for name in FUNCTIONS | CLASSES:
        assert inspect.getdoc(getattr(mshare, name)), name
    for name, member in (*vars(mshare.Region).items(), *vars(mshare.FileMapping).items()):
        if not name.startswith("_"):
            assert inspect.getdoc(member), name


def test_importing_it_takes_the_core_and_attrs_only() -> None:
    """No daemon, no command line, no library that opens something."""
    code = "import sys, mshare; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.split())
    assert loaded & {"mshared", "trio", "pyfuse3", "click", "rich", "numpy"} == set()
    assert {"mshare", "msharefs", "attrs"} <= loaded
