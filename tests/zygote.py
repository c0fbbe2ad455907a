"""A process that has loaded what the daemon is made of, and starts daemons by forking: a restart takes a tenth of it.

Reads a line of JSON for each: the arguments, and variables of its environment. Answers with the pid.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module

LIBRARIES = ("attrs", "cattrs", "cattrs.preconf.json", "click", "pyfuse3", "trio")
"""What takes long to load, and looks at no environment."""


def main() -> None:
    """Start daemons until the input ends."""
    for name in LIBRARIES:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        arguments, env = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.environ.update(env)
            os.close(0)
            command = import_module("mshared.__main__").main
            command(arguments)
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
