"""Flags and a YAML file -> a checked configuration, or a SettingError before anything is run."""

import argparse
import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from bft.config import ONLY_WITH, SettingError


def parse(config_type: type[Any], arguments: Sequence[str], prog: str) -> Any:
    """The configuration that a command line describes; ``--config FILE`` is read first.

    Raises:
        SettingError: a setting, or the YAML file.
        SystemExit: help was asked for (0), or tyro has told what it cannot read (2).
    """
    file, flags = _split(arguments)
    typed = {flag.partition("=")[0] for flag in flags}
    if "--lr" in typed and hasattr(config_type, "learning_rate"):
        raise SettingError("--lr: there is no such flag; it is --learning-rate here")
    if file is not None:
        gone = {_INSTEAD[flag] for flag in typed & _INSTEAD.keys()}
        of_file = yaml_flags(file, config_type)
        flags = [flag for flag in of_file if flag.partition("=")[0] not in gone] + flags
    values = vars(tyro.cli(flags_of(config_type), args=flags, prog=prog))
    try:
        config = config_type(**values)
    except (ValueError, TypeError) as error:
        raise SettingError(str(error)) from error
    for name, (other, allowed) in ONLY_WITH.items():  # a file may hold them, for other runs
        if f"--{name}" not in typed or not hasattr(config, other):
            continue
        value = getattr(config, other)
        if value not in allowed and not (name == "window" and _reads_window(value)):
            raise SettingError(
                f"{name}: got {getattr(config, name)}, which {other}={getattr(config, other)} "
                f"ignores; expected it with {other}={' or '.join(allowed)}"
            )
    _check_paths(config)
    return config


def _reads_window(scheme: str) -> bool:
    if ":" not in scheme:
        return False
    from bft.schemes import load_scheme, takes_window  # and torch, which the run has loaded

    return bool(takes_window(load_scheme(scheme)))


def flags_of(config_type: type[Any]) -> type[Any]:
    """The configuration as tyro reads it: the loss's settings have their choices and their help.

    It checks nothing: tyro would tell what our checks say in a form of its own, without the
    option's name.
    """
    told = []
    types = typing.get_type_hints(config_type)
    for option in dataclasses.fields(config_type):
        if text := option.metadata.get("help"):
            choices = option.metadata["choices"]
            kind = Literal[choices] if choices else types[option.name]
            text = f"{text[0].upper()}{text[1:]}.".replace("`", "")
            told.append((option.name, Annotated[kind, tyro.conf.arg(help=text)]))
    namespace = {"__post_init__": lambda self: None, "__doc__": config_type.__doc__}
    return dataclasses.make_dataclass(
        config_type.__name__, told, bases=(config_type,), namespace=namespace, frozen=True
    )


# A typed flag, and the one of a file that it overrides beside its own.
_INSTEAD = {"--epochs": "--steps", "--steps": "--epochs"}


def in_flags(message: str, config_type: type[Any]) -> str:
    """A message with the names of settings as they are typed: ``lora_rank`` is --lora-rank.

    A word is a name if it starts the message before a colon, stands before an equals sign, or has
    an underscore.
    """
    names = [field.name for field in dataclasses.fields(config_type)]
    long = [name for name in names if "_" in name]
    patterns = [rf"^({'|'.join(names)})(?=:)", rf"\b({'|'.join(names)})(?==)"]
    patterns += [rf"(?<![\w./'-])({'|'.join(long)})(?![\w./'-])"] if long else []
    return re.sub("|".join(patterns), lambda found: f"--{found[0].replace('_', '-')}", message)


def _split(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The value of ``--config``, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="")
    found, rest = parser.parse_known_args(arguments)
    if found.config == "":
        raise SettingError("--config: got nothing, expected a YAML file")
    return found.config and _file_of(found.config), rest


def _file_of(name: str) -> Path:
    """A YAML file, or the one of this name that comes with the package."""
    packaged = Path(__file__).parent / "study" / "configs" / f"{name}.yaml"
    return packaged if packaged.is_file() and not Path(name).exists() else Path(name)


def yaml_flags(path: Path, config_type: type[Any]) -> list[str]:
    """A YAML file as command-line flags, so that one parser checks both.

    A value is the text that stands there, as if it were typed: ``no`` and ``2e-5`` need no quotes.

    Raises:
        SettingError: not YAML, not a mapping of settings to values, or a name that is none.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SettingError(f"--config: {path}{line}: not valid YAML ({problem})") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"--config: {path}: not UTF-8 ({error}), expected YAML") from error
    except OSError as error:
        raise SettingError(f"--config: {path}: {error.strerror}, expected a YAML file") from error
    if not isinstance(root, yaml.MappingNode):
        kind = "nothing" if root is None else root.id
        raise SettingError(f"--config: {path} holds {kind}, expected a mapping: name: value")
    flags: list[str] = []
    types, seen = typing.get_type_hints(config_type), set()
    for key, value in root.value:
        where = f"--config: {path}:{key.start_mark.line + 1}"
        name = str(key.value).replace("-", "_")
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(types)}"
            raise SettingError(f"{where}: there is no setting {key.value!r}; {hint}")
        if name in seen:
            raise SettingError(f"{where}: {key.value!r} comes twice, expected it once")
        seen.add(name)
        flags += _flag(name, value, types[name] is bool, loader, where)
    return flags


def _flag(name: str, node: yaml.Node, switch: bool, loader: Any, where: str) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise SettingError(f"{where}: {name!r}: expected a value or a list of values")
    if isinstance(node, yaml.SequenceNode):
        return [flag, *(item.value for item in items)]
    value = loader.construct_object(node)
    if value is None:
        return [f"{flag}=None"]
    if not switch:
        return [f"{flag}={node.value}"]
    if not isinstance(value, bool):
        raise SettingError(f"{where}: {name!r}: got {node.value!r}, expected true or false")
    return [flag if value else f"--no-{flag[2:]}"]


_READ = ("train_file", "eval_file", "file", "forgetting_file")


def _check_paths(config: Any) -> None:
    """Raises SettingError for a file or folder that a run could not read or write at its end."""
    for name, path in vars(config).items():
        if isinstance(path, Path) and name in _READ:
            _check_read(name, path)
        elif isinstance(path, Path) and name == "data":
            for file in ("train", "test", config.tune_on):
                _check_read(name, config.file(file))
        elif isinstance(path, Path):
            _check_written(name, path, folder=name == "output_dir")


def _check_read(name: str, path: Path) -> None:
    if path.is_dir():
        raise SettingError(f"{name}: {path} is a folder, expected a JSONL file")
    if not path.exists():
        raise SettingError(f"{name}: there is no file {path}")
    if not os.access(path, os.R_OK):
        raise SettingError(f"{name}: {path} may not be read; expected a readable file")


def _check_written(name: str, path: Path, folder: bool) -> None:
    if path.exists() and path.is_dir() != folder:
        kinds = ("folder", "file") if folder else ("file", "folder")
        raise SettingError(f"{name}: {path} is a {kinds[1]}, expected a {kinds[0]}")
    there = path if path.exists() else next(p for p in path.absolute().parents if p.exists())
    if there != path and not there.is_dir():
        raise SettingError(f"{name}: {there} is a file, expected a folder to make {path} in")
    if not os.access(there, os.W_OK):
        raise SettingError(f"{name}: {there} may not be written; expected a place for {path}")
