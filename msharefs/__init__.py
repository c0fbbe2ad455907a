"""The host mm of an msharefs region: what is mapped, what is installed, what a fault means.

Pure: nothing here opens, maps, waits or reads a clock. Callers hand in requests and faults and get
back *effects* (``msharefs.effects``), which the daemon carries out. Start with ``README.md`` beside this file.
"""
