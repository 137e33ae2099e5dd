"""``bft``; and ``python -m bft``, for ``accelerate launch -m bft train ...`` and ``torchrun``."""

import sys


def main() -> int:
    """Runs one command. Importing takes seconds, in which Ctrl-C is one line, too."""
    try:
        from bft.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("bft: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
