"""Command lines derived from dataclasses: a field carries its default, its help and its checks.

    @dataclass
    class GreetConfig:
        '''Greet someone.'''

        name: str = option(help="who is greeted", positional=True)
        times: int = option(1, help="how often", minimum=1)

        examples = ["Ada --times 2"]

    main("python -m hello", "Greetings.", {"greet": Command(GreetConfig, run_greet)})

A command of one configuration gets `--config FILE` as well: a JSON object of field values, or the
`run.json` that an earlier run wrote; flags given beside it win.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import logging
import math
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from serve.errors import Failure, UserError, explain_os_error, install
from serve.files import read_json

_NOISY = (
    "httpx", "urllib3", "filelock", "sentence_transformers", "transformers", "matplotlib",
    "aiobotocore", "botocore",
)  # fmt: skip
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def option(
    default: Any = MISSING,
    *,
    help: str,  # noqa: A002 - the word that argparse uses
    positional: bool = False,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: the default value; without one the flag is required. A list default makes the flag
            take one or more values, a bool default makes it a `--flag / --no-flag` pair.
        help: one sentence, with the why or the source of the default.
        positional: taken by its place instead of a flag.
        choices: the values that are allowed.
        minimum, maximum: inclusive bounds of a number.
        metavar: the placeholder shown in the help.
    """
    metadata = {
        "help": help,
        "positional": positional,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "metavar": metavar,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    if default is MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Command:
    """A command: the dataclass that configures it and the function that runs it.

    `run` may return an exit code; None counts as 0.
    """

    config: type
    run: Callable[[Any], int | None]


Commands: typing.TypeAlias = Mapping[str, Command] | Callable[[list[str]], Mapping[str, Command]]
"""Commands by name, or a function of the arguments that imports the one that is asked for."""


def _plain_type(annotation: Any) -> tuple[type, bool]:
    """The scalar type behind an annotation, and whether it is a list of it."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        inner = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        return _plain_type(inner[0])
    if origin in (list, Sequence):
        return _plain_type(typing.get_args(annotation)[0])[0], True
    return annotation, False


def _may_be_none(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def _convert(field: dataclasses.Field[Any], kind: type, value: Any, flag: str) -> Any:
    """Check one value against the field's type, choices and bounds.

    Raises:
        UserError: naming the flag and what it takes.
    """
    shown = "null" if value is None else repr(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{flag} takes true or false, not {shown}")
        return value
    try:
        # A JSON 3.0 for an int would be silently cut by int(); a bool would become 0 or 1. And
        # everything can be made text: null the name 'None'.
        if isinstance(value, bool | dict | list) or value is None:
            raise ValueError
        if kind is int and isinstance(value, float):
            raise ValueError
        result = kind(value)
    except (TypeError, ValueError, OverflowError):
        word = {int: "a whole number", float: "a number", str: "text"}.get(kind)
        raise UserError(f"{flag} takes {word or f'a {kind.__name__}'}, not {shown}") from None
    meta = field.metadata
    if meta.get("choices") and result not in meta["choices"]:
        raise UserError(f"{flag} takes one of {', '.join(meta['choices'])}, not {value!r}")
    low, high = meta.get("minimum"), meta.get("maximum")
    if isinstance(result, float) and not math.isfinite(result):
        raise UserError(f"{flag} takes a finite number, not {value!r}")
    if low is not None and result < low:
        raise UserError(f"{flag} must be at least {low:.15g}, not {value}")
    if high is not None and result > high:
        raise UserError(f"{flag} must be at most {high:.15g}, not {value}")
    return result


def _flag(field: dataclasses.Field[Any]) -> str:
    if field.metadata.get("positional"):
        return field.name.upper()
    return "--" + field.name.replace("_", "-")


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is not MISSING and field.default not in (None, False, ""):
        return f" (default: {field.default})"
    if field.default_factory is not MISSING:
        values = field.default_factory()
        return f" (default: {' '.join(map(str, values))})" if values else ""
    return ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        # argparse prints the whole usage before the error; the error alone is easier to see.
        raise UserError(f"{message} (see {self.prog} --help)")


def _describe(parser: argparse.ArgumentParser, config: type) -> None:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind, many = _plain_type(hints[field.name])
        meta = field.metadata
        text = (meta["help"] + _default_text(field)).replace("%", "%%")
        keywords: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["metavar"] = meta.get("metavar") or (
                "{" + ",".join(meta["choices"]) + "}" if meta.get("choices") else field.name.upper()
            )
            if many:
                keywords["nargs"] = "+"
        if meta.get("positional"):
            keywords.setdefault("nargs", "?")  # whether it is missing is checked after --config
            if many:
                keywords["nargs"] = "*"
            parser.add_argument(field.name, **keywords)
        else:
            parser.add_argument(_flag(field), dest=field.name, **keywords)


def build_config(config: type, values: Mapping[str, Any]) -> Any:
    """Make the dataclass from plain values, with every value checked.

    Raises:
        UserError: an unknown field, a value of the wrong type, a required value that is missing.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(f"{', '.join(unknown)}: no such setting; there are {', '.join(fields)}")
    hints = typing.get_type_hints(config)
    checked: dict[str, Any] = {}
    for name, field in fields.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if name not in values:
            if required:
                raise UserError(f"{_flag(field)} is missing: {field.metadata['help']}")
            continue
        value = values[name]
        kind, many = _plain_type(hints[name])
        if value is None and _may_be_none(hints[name]):
            checked[name] = None
        elif many:
            if not isinstance(value, list | tuple):
                raise UserError(f"{_flag(field)} takes a list, not {value!r}")
            checked[name] = [_convert(field, kind, item, _flag(field)) for item in value]
        else:
            checked[name] = _convert(field, kind, value, _flag(field))
    return config(**checked)


def _from_file(path: str, command: str) -> dict[str, Any]:
    value = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("config"), dict):  # a run.json
        if value.get("command", command) != command:
            raise UserError(f"{path} was written by '{value['command']}', not by '{command}'")
        value = value["config"]
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object of settings")
    return value


def _parser(prog: str, description: str, commands: Mapping[str, Command]) -> _Parser:
    parser = _Parser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, command in commands.items():
        doc = inspect.cleandoc(command.config.__doc__ or "")
        examples = getattr(command.config, "examples", [])
        epilog = "examples:\n" + "\n".join(f"  {prog} {name} {line}" for line in examples)
        sub = subparsers.add_parser(
            name,
            help=doc.splitlines()[0].replace("%", "%%") if doc else None,
            description=doc,
            epilog=epilog if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _describe(sub, command.config)
        sub.add_argument(
            "--config", dest="config_file", metavar="FILE", default=None,
            help="JSON settings, or the run.json of an earlier run to repeat it; flags win",
        )  # fmt: skip
    return parser


def run(prog: str, description: str, commands: Commands, argv: Sequence[str]) -> int:
    """Parse `argv`, run the command, and give its exit code."""

    def work() -> int | None:
        known = commands(list(argv)) if callable(commands) else commands
        parser = _parser(prog, description, known)
        given = vars(parser.parse_args(list(argv)))
        name = given.pop("command")
        if name is None:
            parser.print_help()
            return 2
        file = given.pop("config_file")
        values = _from_file(file, name) if file else {}
        # An empty positional list is argparse's way of saying that nothing was given.
        values.update({key: value for key, value in given.items() if value != []})
        return known[name].run(build_config(known[name].config, values))

    return guarded(work)


def guarded(work: Callable[[], int | None]) -> int:
    """Do a command's work, and turn what goes wrong into one line and an exit code."""
    _open_streams()
    code = 0
    try:
        code = _told(work)
    finally:  # also where argparse ends with its help
        code = _flushed(code)
    return code


def _open_streams() -> None:
    """A stream that the caller has closed is None: nothing comes from there, and nothing goes."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the locale has no letter for is spelt out
        sys.stdout.reconfigure(errors="backslashreplace")


def _flushed(code: int) -> int:
    """The exit code, after what is left of the output was written.

    Where nobody takes it Python would say so at its end in its own words, with exit code 120.
    """
    try:
        sys.stdout.flush()
        return code
    except OSError as error:
        _drop_output()
        if not code and not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"error: {explain_os_error(error)}\n")
        return code or 1


def _drop_output() -> None:
    with contextlib.suppress(OSError):  # a test's output has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _told(work: Callable[[], int | None]) -> int:
    try:
        return work() or 0
    except (UserError, Failure) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        _drop_output()
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {explain_os_error(error)}\n")
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "trainer", "exporter", "serve", "demo"):
            raise
        sys.stderr.write(f"error: {package} is not installed: {install('all')}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def main(prog: str, description: str, commands: Commands) -> typing.NoReturn:
    """The entry point of a package's `__main__`: `main("python -m trainer", "...", COMMANDS)`."""
    prepare()
    sys.exit(run(prog, description, commands, sys.argv[1:]))


def prepare(form: str = "%(message)s") -> None:
    """What a process of ours does first: log to stderr, and end in order on SIGTERM.

    Raises:
        SystemExit: 2, METAPT_LOG names no level.
    """
    _open_streams()
    given = os.environ.get("METAPT_LOG") or "INFO"
    level = given.upper()
    if level not in _LEVELS:
        sys.stderr.write(f"error: METAPT_LOG is '{given}': set it to one of {', '.join(_LEVELS)}\n")
        raise SystemExit(UserError.exit_code)
    logging.basicConfig(level=level, format=form, stream=sys.stderr)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Servers have their own handlers. Elsewhere the default would leave half-made files behind.
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, _frame: Any) -> typing.NoReturn:
    raise SystemExit(128 + number)


def as_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values (paths become strings)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=_jsonable))


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
