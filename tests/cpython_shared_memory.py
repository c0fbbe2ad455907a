"""CPython's own test cases for shared memory, run on ours: a program, for the tests to start.

    python cpython_shared_memory.py fork|forkserver|spawn

The cases are those of the interpreter that runs this. Its classes are replaced before the cases are imported, in
processes that are started too: they import this file first.
"""

from __future__ import annotations

import multiprocessing.managers
import multiprocessing.shared_memory
import sys
import unittest
from typing import Any

import mshare

standard: Any = multiprocessing.shared_memory
standard.SharedMemory, standard.ShareableList = mshare.SharedMemory, mshare.ShareableList
del standard._posixshmem  # Whoever came upon the standard's own memory would fail.
managers: Any = multiprocessing.managers
managers.SharedMemoryManager = mshare.SharedMemoryManager

STANDARD_LIBRARY_ONLY = {
    "test_shared_memory_SharedMemoryManager_reuses_resource_tracker": "runs a `python -c` that imports the standard's",
    "test_shared_memory_cleaned_after_process_termination": "runs a `python -c` that imports the standard's",
    "test_shared_memory_untracking": "runs a `python -c` that imports the standard's; new in Python 3.13",
    "test_shared_memory_tracking": "runs a `python -c` that imports the standard's; new in Python 3.13",
}
"""Cases that would tell nothing of ours, and why."""

if __name__ == "__main__":
    from test import _test_multiprocessing as cases

    cases.install_tests_in_module_dict(globals(), sys.argv[1])
    case = globals()["WithProcessesTestSharedMemory"]
    names = [name for name in unittest.TestLoader().getTestCaseNames(case) if name not in STANDARD_LIBRARY_ONLY]
    result = unittest.TextTestRunner(verbosity=2).run(unittest.TestSuite(map(case, names)))
    sys.exit(not result.wasSuccessful())
