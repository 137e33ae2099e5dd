"""``python -m benchmarks COMMAND``; each command's module says what it does."""

import importlib
import sys

COMMANDS = (
    "loss",
    "train",
    "scale",
    "record",
    "static",
    "model",
    "gpu",
    "plot",
    "tables",
)


def main() -> None:
    """Runs one command, and imports no other: a GPU machine may lack what those need."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise SystemExit(f"python -m benchmarks: expected one of {', '.join(COMMANDS)}")
    name, arguments = sys.argv[1], sys.argv[2:]
    module, prog = importlib.import_module(f"benchmarks.{name}"), f"python -m benchmarks {name}"
    if hasattr(module, "parse"):
        config = module.parse(arguments, prog)
    else:
        import tyro

        config = tyro.cli(module.Config, args=arguments, prog=prog)
    module.main(config)


if __name__ == "__main__":
    main()
