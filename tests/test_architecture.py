"""Which way imports go, which words stay where, and how long things may get."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted(ROOT.glob("msharefs/**/*.py"))
DAEMON = sorted(ROOT.glob("daemon/mshared/**/*.py"))
CLIENT = sorted(ROOT.glob("client/mshare/**/*.py"))
CLI = [path for path in CLIENT if (ROOT / "client/mshare/cli") in path.parents]
PACKAGES = {"msharefs": CORE, "mshared": DAEMON, "mshare": CLIENT}
ALL = CORE + DAEMON + CLIENT

IMPURE = {
    *(
        "os",
        "io",
        "pathlib",
        "shutil",
        "tempfile",
        "socket",
        "select",
        "selectors",
        "mmap",
        "ctypes",
        "fcntl",
        "signal",
    ),
    *("subprocess", "threading", "multiprocessing", "asyncio", "time", "datetime", "random", "trio", "pyfuse3"),
}
"""What opens, maps, waits or reads a clock."""
FUSE_WORDS = {"FUSEError", "EntryAttributes"}

LONGEST_FUNCTION = 60
LONG_FUNCTION = 40
LONG_FUNCTIONS = 0.07
LONGEST_FILE = 400


def name_of(path: Path) -> str:
    """For the ids of tests."""
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules that are imported anywhere below ``tree``, in full; relative ones with their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def packages(path: Path) -> set[str]:
    """The top-level packages that a file imports."""
    return {module.partition(".")[0] for module in imports(parse(path))}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Functions and methods of a file: name and lines, from ``def`` to the last."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def words(path: Path) -> set[str]:
    """Every name and attribute that a file uses or imports."""
    found: set[str] = set()
    for node in ast.walk(parse(path)):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word):
                found.add(word)
            case ast.ImportFrom(names=names):
                found |= {alias.name for alias in names}
    return found


def test_imports_are_found_wherever_they_stand() -> None:
    """This file's own eyes: what it does not see, it cannot forbid."""
    source = """
import os.path, trio as t
from . import a
def f():
    from mshared.apply import x
    if TYPE_CHECKING:
        import pyfuse3
"""
    assert set(imports(ast.parse(source))) == {"os.path", "trio", ".", "mshared.apply", "pyfuse3"}


def test_there_is_something_to_look_at() -> None:
    assert {path.name for path in CORE} >= {"host_mm.py", "fault.py", "page_table.py"}


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_imports_are_written_in_full(path: Path) -> None:
    """So that the tests below see where they go."""
    assert "" not in packages(path)


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_is_pure_and_knows_neither_daemon_nor_client(path: Path) -> None:
    assert packages(path) & (IMPURE | {"mshared", "mshare"}) == set()


@pytest.mark.parametrize("path", DAEMON, ids=name_of)
def test_the_daemon_does_not_know_the_client(path: Path) -> None:
    assert "mshare" not in packages(path)


@pytest.mark.parametrize("path", CLIENT, ids=name_of)
def test_the_client_needs_the_standard_library_and_the_core_only(path: Path) -> None:
    """And attrs, which the core is made of; its command line also what it is made of."""
    allowed = sys.stdlib_module_names | {"msharefs", "mshare", "attrs"}
    if path in CLI:
        allowed |= {"click", "rich"}
    assert packages(path) <= allowed


@pytest.mark.parametrize("path", DAEMON, ids=name_of)
def test_the_words_of_fuse_stay_in_one_file(path: Path) -> None:
    if path.name != "fs.py":
        assert words(path) & FUSE_WORDS == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_make_no_cycle(package: str) -> None:
    """Imports for types only, or inside a function, do not count: they are not made when a module is loaded."""
    graph: dict[str, set[str]] = {}
    for path in PACKAGES[package]:
        module = path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("daemon/").removeprefix("client/")
        loaded = [node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        graph[module.replace("/", ".")] = {name for node in loaded for name in imports(node)}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    assert [(name, lines) for name, lines in functions(path) if lines > LONGEST_FUNCTION] == []


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_no_file_is_too_long_to_know(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= LONGEST_FILE


@pytest.mark.parametrize("package", PACKAGES)
def test_most_functions_are_short(package: str) -> None:
    lengths = [lines for path in PACKAGES[package] for _, lines in functions(path)]
    assert sum(lines > LONG_FUNCTION for lines in lengths) <= LONG_FUNCTIONS * len(lengths)


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/**/test_*.py")), ids=name_of)
def test_who_counts_huge_pages_does_not_run_beside_others_that_do(path: Path) -> None:
    source = path.read_text()
    assert "from hugepages import" not in source or "pytest.mark.pool" in source
