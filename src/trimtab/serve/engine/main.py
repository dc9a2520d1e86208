"""The engine's `main`, as `trimtab.serve.child` starts it."""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback

from trimtab.errors import TrimtabError
from trimtab.runtime.kernels import use_isa
from trimtab.serve.channel import BlockingChannel, ChannelClosed
from trimtab.serve.engine.loop import Loop
from trimtab.serve.messages import PROTOCOL, Start, Stopped

#: Exit codes: drained, broke, could not start as asked.
DRAINED, BROKE, REFUSED = 0, 1, 2


def main(channel: BlockingChannel) -> int:
    """Load what Start names, serve until Drain or a closed channel, and return the exit code."""
    try:
        first, *rest = channel.receive(None)
    except ChannelClosed:
        return BROKE
    if not isinstance(first, Start) or first.protocol != PROTOCOL:
        return _stop(channel, f"The engine expected a Start of protocol {PROTOCOL} first.", REFUSED)
    try:
        use_isa(first.isa)
        loop = Loop(channel, first)
        ready = loop.load()
        gc.collect()
        gc.freeze()  # what was loaded stays: later collections need not look at it
    except TrimtabError as error:
        return _stop(channel, str(error), REFUSED)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return _stop(channel, f"The engine broke while it loaded: {type(error).__name__}: {error}", BROKE)
    try:
        loop.send(ready)
        for message in rest:
            loop.handle(message)
        return loop.run()
    except ChannelClosed:
        return BROKE
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return _stop(channel, f"The engine broke: {type(error).__name__}: {error}", BROKE)
    finally:
        gc.unfreeze()


def _stop(channel: BlockingChannel, reason: str, code: int) -> int:
    with contextlib.suppress(ChannelClosed):
        channel.send(Stopped(reason, code))
        channel.drain()
    return code
