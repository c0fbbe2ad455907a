"""Measurements against the peers, side by side in one run: ``python -m benchmarks``, ``python -m benchmarks.demo``.

Who does what: ``daemon`` starts an mshared of its own, ``driver`` starts worker processes and talks to them, ``worker``
runs in those, ``memory`` opens the kinds of memory compared, ``measure`` says what is done in which order, ``report``
turns samples into tables.
"""
