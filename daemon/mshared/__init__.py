"""mshared, the daemon of msharefs: one trio loop that keeps regions and serves their faults.

Concurrency, in one place. Tasks: FUSE (``fs``), one a connection (``control``), the pager (``pager``), the sweeper that
notices processes that are gone (``lifetimes``), the search for forked children (``forks``), one for each piece of a
file that is read for a fault (``filling``), and short ones that close descriptors that others sent (``tickets``).

All share one thread, so the model (``msharefs``) is atomic between two awaits; deciding and applying effects has no
await in between. Changes of one region wait for each other (``LiveRegion.lock``), since they may write files back
first. Faults that come while a change is carried out wait for its end. What was read for a fault off the loop is
looked at anew before it is installed. Worker threads read and write files, read /proc, and close descriptors; they
never see the model.

What fails in a handler ends that call or that connection, never the daemon.
"""
