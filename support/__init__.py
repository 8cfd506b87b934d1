"""What all commands lean on, and none of the method: files, pictures, errors, the toy world."""

import sys


def say_stopped(kind, error, trace, usual=sys.excepthook):
    """Ctrl-C before a command begins, while torch is being imported, is no traceback either."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        usual(kind, error, trace)


sys.excepthook = say_stopped
