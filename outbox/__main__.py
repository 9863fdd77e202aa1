"""`python -m outbox` is the command `outbox`, which is loaded so that a signal ends it silently from the start."""

import os
import signal
import sys

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
NOT_DRAINED = 3


def main() -> None:
    """Load the command and run it."""
    if sys.argv[1:2] == ["relay"]:
        # Until it has handlers of its own: nothing is begun, so there is nothing to finish.
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stopped)
    # Ctrl-C while Python loads modules, or at its very end, is shown as a traceback: there the system's way is better.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from outbox.cli.app import main as command

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command()
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stopped(*_: object) -> None:
    """End the process as a relay does that is stopped; no exception, which a module that is being loaded would show."""
    os._exit(NOT_DRAINED if "--drain" in sys.argv else 0)


if __name__ == "__main__":
    main()
