"""How the engine process begins: ``python -m trimtab.serve.child PARENT FD MODULE``, started by the front.

`MODULE` offers ``main(channel: BlockingChannel) -> int``: it answers Start, serves until Drain or a closed channel, and
returns the exit code. Nothing else is asked of an engine.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import sys

from trimtab.serve.channel import BlockingChannel

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when `parent` ends, and end now if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main(arguments: list[str]) -> int:
    """Run an engine over an inherited socket."""
    parent, fd, module = arguments
    die_with_parent(int(parent))
    # The terminal sends these to the whole group; the front decides what becomes of them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = BlockingChannel(socket.socket(fileno=int(fd)))
    try:
        return importlib.import_module(module).main(channel)
    finally:
        channel.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
