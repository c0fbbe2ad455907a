"""mshared, the daemon of msharefs: one trio loop that keeps regions and serves their faults.

Concurrency, in one place. Tasks: FUSE (``fs``), one a connection (``control``), the pager (``pager``), the sweeper that
notices processes that are gone (``lifetimes``), and short ones that close descriptors that others sent (``tickets``).
All share one thread, so the model (``msharefs``) is atomic between two awaits; deciding and applying effects has no
await in between. What fails in a handler ends that call or that connection, never the daemon.
"""
