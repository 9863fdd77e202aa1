"""`python -m outbox` is the command `outbox`, which is loaded so that Ctrl-C ends it silently from the start."""

import signal


def main() -> None:
    """Load the command and run it."""
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


if __name__ == "__main__":
    main()
