"""Flags, JSON configs and defaults are one thing: a dataclass, read here.

Precedence: command line, then the JSON file, then the field's default. Flags accept dashes and
underscores alike. Every refusal is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from arithmetic_llm.runtime import UserError, require_file

Config = TypeVar("Config")


def opt(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with the help text that its flag shows.

    ``required=True`` marks a value that flag or JSON must give; ``choices`` lists what is allowed;
    ``at_least``, ``above`` and ``at_most`` bound a number; ``weights=True`` marks a text of weights
    by name, which JSON may give as an object.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


# ------------------------------------------------------------------------------ the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")


def parse(config_class: type[Config], argv: Sequence[str] | None, description: str) -> Config:
    """A config from the command line and, where ``--config FILE`` is given, a JSON file."""
    (config,) = parse_many({"config": config_class}, argv, description)
    return config


def parse_many(
    sections: dict[str, type], argv: Sequence[str] | None, description: str
) -> tuple[Any, ...]:
    """One instance of each config class; section ``model_config`` reads ``--model-config FILE``.

    Raises:
        UserError: unknown flag or key, wrong type, value out of bounds, missing required value.
    """
    given = read_flags(sections, argv, description)
    return tuple(
        build(cls, _section_json(given, name), {k: given[k] for k in _names(cls) if k in given})
        for name, cls in sections.items()
    )


def parse_run(
    sections: dict[str, type], argv: Sequence[str] | None, description: str
) -> tuple[Any, ...]:
    """Like `parse_many` for a training stage, where ``--resume RUN`` brings the run's own settings.

    A flag that says otherwise than the run did is refused: a resumed run is the same run.
    """
    given = read_flags(sections, argv, description)
    folder = given.pop("resume", "")
    if not folder:
        configs = parse_many(sections, argv, description)
        if configs[0].resume:
            raise UserError("resume: belongs on the command line, --resume RUN, not into a file")
        return configs
    for name in sections:
        if name in given:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: {folder} has its own settings; leave it out with --resume")
    files = {"config": "training_config.json", "model_config": "model_config.json"}
    configs = []
    for name, cls in sections.items():
        saved = build(cls, read_json(Path(folder) / files[name]), {})
        for key in _names(cls):
            if key in given and _typed(key, given[key], _hints(cls)[key]) != getattr(saved, key):
                raise UserError(
                    f"--{key.replace('_', '-')} {given[key]}: {folder} runs with "
                    f"{getattr(saved, key)}; leave it out, or start anew with --init-from"
                )
        configs.append(saved)
    configs[0] = dataclasses.replace(configs[0], resume=folder)
    return tuple(configs)


def read_flags(
    sections: dict[str, type], argv: Sequence[str] | None, description: str
) -> dict[str, Any]:
    """What the command line says and nothing else: no defaults, no JSON."""
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, cls in sections.items():
        _add_flag(parser, name, str, {"help": f"JSON file with values for these flags ({name})"})
        group = parser.add_argument_group(_heading(cls))
        for field in dataclasses.fields(cls):
            _add_flag(group, field.name, _hints(cls)[field.name], field.metadata, field.default)
    arguments = [_dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [word for action in parser._actions for word in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]}{_did_you_mean(unknown[0], flags)}")
    return vars(namespace)


def _dashes(word: str) -> str:
    """``--max_seq_length=5`` -> ``--max-seq-length=5``; values are left alone."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _add_flag(parser: Any, name: str, hint: Any, metadata: Any, default: Any = None) -> None:
    kind, count = _scalar(hint)
    flag = "--" + name.replace("_", "-")
    text = metadata["help"].replace("%", "%%") + _shown_default(metadata, default)
    common = {"dest": name, "help": text, "default": argparse.SUPPRESS}
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    else:
        choices = metadata.get("choices")
        metavar = None if choices else kind.__name__.upper()
        parser.add_argument(
            flag, type=kind, nargs=count, choices=choices, metavar=metavar, **common
        )


def _shown_default(metadata: Any, default: Any) -> str:
    if metadata.get("required"):
        return " (required)"
    if default is None or default == "" or isinstance(default, bool):
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f" (default: {shown})"


# ---------------------------------------------------------------------------------- building


def build(config_class: type[Config], from_json: dict, from_flags: dict) -> Config:
    """Merge, check every value, construct; ``from_json`` may hold wrong types or unknown keys."""
    names = _names(config_class)
    for key in from_json:
        if key not in names:
            raise UserError(f"unknown config key {key!r}{_did_you_mean(key, names)}")
    hints = _hints(config_class)
    from_json = {key: _as_flag(config_class, key, value) for key, value in from_json.items()}
    values = {key: _typed(key, value, hints[key]) for key, value in from_json.items()}
    values.update({key: _typed(key, value, hints[key]) for key, value in from_flags.items()})
    for field in dataclasses.fields(config_class):
        _check(field, values.get(field.name, field.default))
    return config_class(**values)


def _as_flag(config_class: type, key: str, value: Any) -> Any:
    """Weights by name, ``{"a": 1, "b": 0.5}``, in the words of their flag, ``a=1,b=0.5``."""
    weights = config_class.__dataclass_fields__[key].metadata.get("weights")
    if not (weights and isinstance(value, dict)):
        return value
    return ",".join(f"{name}={weight}" for name, weight in value.items())


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file, or a one-line :class:`UserError` with file and line."""
    path = require_file(path, "JSON config")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except (UnicodeDecodeError, RecursionError):
        raise UserError(f"{path}: not a JSON text file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, {{...}}, not {type(value).__name__}")
    return value


def to_json(config: Any) -> str:
    """The config as JSON text that ``--config`` reads back to an equal config."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _section_json(given: dict[str, Any], name: str) -> dict[str, Any]:
    return read_json(given[name]) if name in given else {}


def _typed(key: str, value: Any, hint: Any) -> Any:
    """JSON has one kind of list and loose numbers; a config field has exactly one type."""
    kind, count = _scalar(hint)
    if value is None and type(None) in typing.get_args(hint):
        return None
    if count is not None:
        if not isinstance(value, list | tuple) or len(value) != count:
            raise UserError(f"{key}: needs {count} values, not {value!r}")
        return tuple(_typed(key, item, kind) for item in value)
    whole_float = kind is int and isinstance(value, float) and value.is_integer()
    if (kind is float and type(value) is int) or whole_float:
        return kind(value)
    if type(value) is not kind:
        raise UserError(f"{key}: needs {kind.__name__}, not {value!r}")
    return value


def _check(field: dataclasses.Field, value: Any) -> None:
    metadata = field.metadata
    flag = "--" + field.name.replace("_", "-")
    if metadata.get("required") and value in (None, ""):
        raise UserError(f"{flag} is required; see --help")
    if value is None:
        return
    if "choices" in metadata and value not in metadata["choices"]:
        raise UserError(f"{field.name}: {value!r} is none of {', '.join(metadata['choices'])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag}: must be a finite number, not {value}")
    if "at_least" in metadata and value < metadata["at_least"]:
        raise UserError(f"{flag}: must be at least {metadata['at_least']}, not {value}")
    if "above" in metadata and value <= metadata["above"]:
        raise UserError(f"{flag}: must be above {metadata['above']}, not {value}")
    if "at_most" in metadata and value > metadata["at_most"]:
        raise UserError(f"{flag}: must be at most {metadata['at_most']}, not {value}")


def check_fields(config: Any) -> None:
    """Hold a config to the bounds and choices of its own fields, wherever it was made.

    Raises:
        UserError: the first value that is out of bounds, by the name of its flag.
    """
    for field in dataclasses.fields(config):
        _check(field, getattr(config, field.name))


def _scalar(hint: Any) -> tuple[type, int | None]:
    """``int | None`` -> (int, None); ``tuple[int, int]`` -> (int, 2)."""
    if isinstance(hint, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], len(typing.get_args(hint))
    return hint, None


def _hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def _names(config_class: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def _heading(config_class: type) -> str:
    return (config_class.__doc__ or config_class.__name__).strip().splitlines()[0].rstrip(".")


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; see --help"


# ------------------------------------------------------------------------------ running a script


def run_main(main: Callable[[Sequence[str] | None], int | None]) -> typing.NoReturn:
    """Run a script's ``main`` and turn what a user can cause into one line and an exit code."""
    try:
        code = main(None) or 0
        sys.stdout.flush()  # a full disk shows here, and not at exit where it would be a mess
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `print_token_table.py | head`
        code = 0
    except (UserError, OSError, MemoryError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        code = 2
    except RuntimeError as error:  # torch's out-of-memory errors have no common base class
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        print(
            "error: out of memory; use a smaller --batch-size or model, or --device cpu",
            file=sys.stderr,
        )
        code = 2
    _let_go_of_output()
    sys.exit(code)


def _let_go_of_output() -> None:
    """What standard output does not take now, Python would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller --batch-size or a smaller model"
    return " ".join(str(error).split())
