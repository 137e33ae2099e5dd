"""``python -m benchmarks COMMAND``; the modules of ``benchmarks.run`` describe the commands."""

import importlib
import pkgutil
import sys

from benchmarks import run


def main() -> None:
    """Runs one command, and imports no other: a GPU machine may lack what the others need."""
    names = [module.name for module in pkgutil.iter_modules(run.__path__)]
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        raise SystemExit(f"python -m benchmarks: expected one of {', '.join(names)}")
    name, arguments = sys.argv[1], sys.argv[2:]
    module, prog = importlib.import_module(f"benchmarks.run.{name}"), f"python -m benchmarks {name}"
    if hasattr(module, "parse"):
        config = module.parse(arguments, prog)
    else:
        import tyro

        config = tyro.cli(module.Config, args=arguments, prog=prog)
    module.main(config)


if __name__ == "__main__":
    main()
