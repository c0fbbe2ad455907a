"""Measurements against the peers, side by side in one run: ``python -m benchmarks``, ``python -m benchmarks.demo``.

Who does what: each module of ``groups`` says what is measured and how it is shown, in the terms of ``group``; ``suite``
runs them; ``daemon`` starts an mshared of its own, ``driver`` starts worker processes and talks to them, ``worker``
runs in those and can do what the modules of ``work`` can, ``memory`` opens the kinds of memory compared; ``results`` is
what is kept, from which ``report`` and ``plots`` make tables and pictures. README.md tells how to run and to read it.
"""
