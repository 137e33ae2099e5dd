"""``python -m benchmarks COMMAND``; the modules of ``benchmarks.run`` describe the commands."""

import ast
import importlib
import pkgutil
import sys
from pathlib import Path

from benchmarks import run


def main() -> None:
    """Runs one command, and imports no other: a GPU machine may lack what the others need."""
    names = [module.name for module in pkgutil.iter_modules(run.__path__)]
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(usage(sys.argv[1:], names))
    name, arguments = sys.argv[1], sys.argv[2:]
    module, prog = importlib.import_module(f"benchmarks.run.{name}"), f"python -m benchmarks {name}"
    if hasattr(module, "parse"):
        config = module.parse(arguments, prog)
    else:
        import tyro

        config = tyro.cli(module.Config, args=arguments, prog=prog)
    module.main(config)


def usage(arguments: list[str], names: list[str]) -> int:
    """Prints the commands; returns the exit status, 2 unless help was asked for."""
    asked = arguments[:1] in (["-h"], ["--help"])
    out = sys.stdout if asked else sys.stderr
    if arguments and not asked:
        print(f"python -m benchmarks: got {arguments[0]!r}, expected a command\n", file=out)
    print("usage: python -m benchmarks COMMAND [flags]\n", file=out)
    for name in names:
        source = Path(run.__path__[0], f"{name}.py").read_text(encoding="utf-8")
        first = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
        print(f"  {name:8}{first.partition(': ')[2]}", file=out)
    print("\npython -m benchmarks COMMAND --help lists a command's flags", file=out)
    return 0 if asked else 2


if __name__ == "__main__":
    main()
