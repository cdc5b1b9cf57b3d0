"""Flags, JSON configs and defaults are one thing: a dataclass, read here.

Precedence: command line, then the JSON file, then the field's default. Flags accept dashes and
underscores alike. A setting that can have no effect beside the others is refused, or gives way to
the command line. Every refusal is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import re
import sys
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from arithmetic_llm.distributed import is_launched, together
from arithmetic_llm.runtime import UserError, require_file

Config = TypeVar("Config")
Clause = Mapping[str, Any]  # settings by name, and what one of them must be; see `opt`
OUT_OF_MEMORY = "out of memory; use a smaller batch (--help says which flags cut it) or model"
SET_UP = "activate the environment that `make quickstart` or `make test` has set up (README.md)"
ANY_NUMBER = "*"  # of values, as argparse spells it
COMMAND_LINE, DEFAULT = "the command line", "the default"  # where a value comes from, if not a file


@dataclasses.dataclass(frozen=True)
class Above:
    """In ``needs``: any number greater than the bound."""

    bound: float

    def holds(self, value: Any) -> bool:
        return value is not None and value > self.bound

    def __str__(self) -> str:
        return f"above {self.bound}"


@dataclasses.dataclass(frozen=True)
class Below:
    """In ``needs``: any number less than the bound; a default of None is."""

    bound: float

    def holds(self, value: Any) -> bool:
        return value is None or value < self.bound

    def __str__(self) -> str:
        return f"below {self.bound}"


def opt(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with the help text that its flag shows.

    ``required=True`` marks a value that flag or JSON must give wherever it has an effect;
    ``positional`` is the word that stands for a value given by its place and not by a flag, or for
    several if the field is a ``tuple[T, ...]``;
    ``choices`` lists what is allowed; ``at_least``, ``above`` and ``at_most`` bound a number;
    ``weights=True`` marks a text of weights by name, which JSON may give as an object; ``unset``
    says what a default of None stands for.

    ``needs`` lists what must hold for the setting to have any effect. Each entry maps other
    settings to what they must be, and one of them must be so: the value itself, one of a tuple of
    values, `Above` or `Below` a bound. One that the script does not have stands in nobody's way.

        needs=[{"data_mode": "generated"}]             prompts must be generated
        needs=[{"max_steps": 0}]                       max_steps overrides it
        needs=[{"test_file": "", "temperature": Above(0)}, {"style": ("typed", "padded")}]
                                                       (no file or sampling) and a style of the two

    ``never`` gives the reason why a setting that a stage inherits has no effect there at all; its
    flag is not shown.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def like(config_class: type, name: str, *default: Any, **metadata: Any) -> Any:
    """The field of another config class; its default or some of its metadata may change."""
    field = config_class.__dataclass_fields__[name]
    (default,) = default or (field.default,)
    return dataclasses.field(default=default, metadata={**field.metadata, **metadata})


# ------------------------------------------------------------------------------ the command line


class _FlagParser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see --help")


def parse(config_class: type[Config], argv: Sequence[str] | None, description: str) -> Config:
    """A config from the command line and, where ``--config FILE`` is given, a JSON file."""
    (config,) = parse_many({"config": config_class}, argv, description)
    return config


def parse_many(
    sections: dict[str, type],
    argv: Sequence[str] | None,
    description: str,
    is_lenient: Callable[[str], bool] = lambda file: False,
    locate: Callable[[str], str] = str,
) -> tuple[Any, ...]:
    """One instance of each config class; section ``model_config`` reads ``--model-config FILE``.

    Args:
        is_lenient: whether values of a file that can have no effect give way without being refused.
        locate: where a file is that is given so.

    Raises:
        UserError: unknown flag or key, wrong type, value out of bounds, missing required value, a
            setting that can have no effect.
    """
    given = read_flags(sections, argv, description)
    settings: dict[str, Setting] = {}
    for name, cls in sections.items():
        file = locate(given.get(name, ""))
        flags = {key: given[key] for key in _names(cls) if key in given}
        settings |= settings_of(cls, read_json(file) if name in given else {}, flags, file)
    settings = without_void(settings, is_lenient)
    return tuple(construct(cls, settings) for cls in sections.values())


def read_flags(
    sections: dict[str, type], argv: Sequence[str] | None, description: str
) -> dict[str, Any]:
    """Values of the command line alone: no defaults, no JSON."""
    parser = _FlagParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, cls in sections.items():
        _add_flag(parser, name, str, {}, f"JSON file with values for these flags ({name})")
        group = parser.add_argument_group(_heading(cls))
        for field in dataclasses.fields(cls):
            text = _help(field, sections.values())
            add = _add_positional if "positional" in field.metadata else _add_flag
            add(group, field.name, _hints(cls)[field.name], field.metadata, text)
    arguments = [_dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
    namespace, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        flags = [word for action in parser._actions for word in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]}{_did_you_mean(unknown[0], flags)}")
    return vars(namespace)


def _dashes(word: str) -> str:
    """``--max_seq_length=5`` -> ``--max-seq-length=5``; values are left alone.

    But ``-3+4`` gets a space in front: argparse would take it for a flag.
    """
    if re.match(r"-[\d(]", word):
        return f" {word}"
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _add_flag(parser: Any, name: str, hint: Any, metadata: Any, help: str) -> None:
    kind, count = _scalar(hint)
    text = argparse.SUPPRESS if "never" in metadata else help.replace("%", "%%")
    common = {"dest": name, "help": text, "default": argparse.SUPPRESS}
    if kind is bool:
        parser.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, **common)
    else:
        choices = metadata.get("choices")
        metavar = None if choices else kind.__name__.upper()
        parser.add_argument(
            flag_of(name), type=kind, nargs=count, choices=choices, metavar=metavar, **common
        )


def _add_positional(parser: Any, name: str, hint: Any, metadata: Any, help: str) -> None:
    """Values by their place; none is fine with the parser, since JSON may give them."""
    kind, count = _scalar(hint)
    nargs, word = ("?" if count is None else "*"), metadata["positional"]
    text = help.replace("%", "%%")
    parser.add_argument(
        name, type=kind, nargs=nargs, metavar=word, help=text, default=argparse.SUPPRESS
    )


# ------------------------------------------------------------------- what --help and the docs say


def flag_of(name: str) -> str:
    """``batch_size`` -> ``--batch-size``."""
    return "--" + name.replace("_", "-")


def word_of(field: dataclasses.Field) -> str:
    """What a user types for a field: ``--batch-size``, or ``RUN`` if its place tells."""
    return field.metadata.get("positional") or flag_of(field.name)


def shown(value: Any) -> str:
    """A value as it stands on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def default_of(field: dataclasses.Field, sections: Iterable[type]) -> str:
    """Value of a flag that is not given: ``32``, ``off``, ``required``, or nothing."""
    if field.metadata.get("required"):
        return f"required {_needed(field, sections)}".rstrip()
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return field.metadata.get("unset", "") if field.default is None else shown(field.default)


def needs_of(field: dataclasses.Field, sections: Iterable[type]) -> str:
    """``; only with --data-mode generated``, if the field is void without; or nothing."""
    needed = "" if field.metadata.get("required") else _needed(field, sections)
    return needed and f"; only {needed}"


def _help(field: dataclasses.Field, sections: Iterable[type]) -> str:
    text, default = field.metadata["help"], default_of(field, sections)
    label = "" if field.metadata.get("required") else "default: "
    return text + needs_of(field, sections) + (f" ({label}{default})" if default else "")


def _needed(field: dataclasses.Field, sections: Iterable[type]) -> str:
    """``with --data-mode generated``: each clause of ``needs`` that can fail, in words."""
    fields = {f.name: f for cls in sections for f in dataclasses.fields(cls)}
    clauses = [
        " or ".join(_in_words(name, wanted) for name, wanted in clause.items())
        for clause in field.metadata.get("needs", ())
        if clause.keys() <= fields.keys()
        and not any(_always(fields[name], wanted) for name, wanted in clause.items())
    ]
    return ", and ".join(clauses)


def _always(field: dataclasses.Field, wanted: Any) -> bool:
    """Whether no value that the field may have is another than wanted."""
    return isinstance(wanted, Above) and field.metadata.get("at_least", -math.inf) > wanted.bound


def _in_words(name: str, wanted: Any) -> str:
    """``with --schedule cosine or linear``, ``without --max-steps``."""
    return f"with {flag_of(name)} {_text(wanted)}" if wanted else f"without {flag_of(name)}"


def _text(wanted: Any) -> str:
    return " or ".join(wanted) if isinstance(wanted, tuple) else str(wanted)


# ---------------------------------------------------------------------------------- building


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field, its value, and where that comes from: `COMMAND_LINE`, `DEFAULT` or a JSON file."""

    field: dataclasses.Field
    value: Any
    source: str = DEFAULT

    def __str__(self) -> str:
        """The user's words: ``--batch-size 16``, or ``batch_size 16 (from recipe.json)``."""
        name = self.field.name
        if self.source != COMMAND_LINE:
            return f"{name} {shown(self.value)} (from {self.source})"
        if isinstance(self.value, bool):
            return flag_of(name if self.value else f"no_{name}")
        return f"{flag_of(name)} {shown(self.value)}"


def build(config_class: type[Config], from_json: dict, from_flags: dict) -> Config:
    """Merge, check every value, construct; ``from_json`` may hold wrong types or unknown keys."""
    return construct(config_class, settings_of(config_class, from_json, from_flags))


def settings_of(
    config_class: type, from_json: dict, from_flags: dict, file: str = ""
) -> dict[str, Setting]:
    """Every field of a config class with its value, by name; types and bounds are checked."""
    names, hints = _names(config_class), _hints(config_class)
    for key in from_json:
        if key not in names:
            raise UserError(f"unknown config key {key!r}{_did_you_mean(key, names)}")
    from_json = {key: _as_flag(config_class, key, value) for key, value in from_json.items()}
    fields = config_class.__dataclass_fields__
    settings = {name: Setting(fields[name], fields[name].default) for name in names}
    for values, source in ((from_json, file), (from_flags, COMMAND_LINE)):
        for key, value in values.items():
            settings[key] = Setting(fields[key], _typed(key, value, hints[key]), source)
    for setting in settings.values():
        _check(setting.field, setting.value)
    return settings


def construct(config_class: type[Config], settings: Mapping[str, Setting]) -> Config:
    """A config of the settings that are its own.

    Raises:
        UserError: a required value is missing; the config itself refuses its values.
    """
    values = {name: settings[name].value for name in _names(config_class)}
    for name, value in values.items():
        field = settings[name].field
        required = field.metadata.get("required") and not unmet(field, settings)
        if required and value in (None, "", ()):
            where = _needed(field, [config_class])
            raise UserError(f"{f'{word_of(field)} is required {where}'.rstrip()}; see --help")
    return config_class(**values)


def contradicted(config: Any, flags: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Flags that say otherwise than a config: the flag, what it says, what the config says."""
    for key in _names(type(config)):
        ours = getattr(config, key)
        if key in flags and _typed(key, flags[key], _hints(type(config))[key]) != ours:
            yield flag_of(key), shown(flags[key]), shown(ours)


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
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError):  # no UTF-8, a number beyond all bounds, too deep
        raise UserError(f"{path}: not a JSON text file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, {{...}}, not {type(value).__name__}")
    return value


def to_json(config: Any) -> str:
    """The config as JSON text that ``--config`` reads back to an equal config."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def _typed(key: str, value: Any, hint: Any) -> Any:
    """JSON has one kind of list and loose numbers; a config field has exactly one type."""
    kind, count = _scalar(hint)
    if value is None and type(None) in typing.get_args(hint):
        return None
    if count is not None:
        if not isinstance(value, list | tuple) or count not in (ANY_NUMBER, len(value)):
            raise UserError(f"{key}: needs {_how_many(count)}, not {value!r}")
        return tuple(_typed(key, item, kind) for item in value)
    whole_float = kind is int and isinstance(value, float) and value.is_integer()
    if (kind is float and type(value) is int) or whole_float:
        return kind(value)
    if type(value) is not kind:
        raise UserError(f"{key}: needs {kind.__name__}, not {value!r}")
    return value


def _check(field: dataclasses.Field, value: Any) -> None:
    metadata, flag = field.metadata, flag_of(field.name)
    if isinstance(value, tuple):
        for each in value:
            _check(field, each)
        return
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


def _how_many(count: int | str) -> str:
    return "a list" if count == ANY_NUMBER else f"{count} values"


def _scalar(hint: Any) -> tuple[type, int | str | None]:
    """``int | None`` -> (int, None); ``tuple[int, int]`` -> (int, 2); with ``...`` any number."""
    if isinstance(hint, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is tuple:
        kind, *others = typing.get_args(hint)
        return kind, ANY_NUMBER if others == [...] else 1 + len(others)
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


# ------------------------------------------------------------------ settings that need others


def without_void(
    settings: Mapping[str, Setting], is_lenient: Callable[[str], bool]
) -> dict[str, Setting]:
    """The settings, those that can have no effect at their defaults.

    What a file says gives way, in one printed line, to the command line; so does what a lenient
    file says, whatever makes it void.

    Raises:
        UserError: a void flag; a void value that its own file, or a default, makes void.
    """
    kept, given_way = dict(settings), defaultdict(list)
    for name, setting in settings.items():
        default, source = setting.field.default, setting.source
        why = unmet(setting.field, settings)
        if not why or (source != COMMAND_LINE and setting.value == default):
            continue
        if not (is_lenient(source) or _gives_way(setting, why, settings)):
            raise UserError(f"{setting} has no effect {_because(why, settings)}; {_remedy(why)}")
        kept[name] = Setting(setting.field, default)
        given_way[_because(why, settings)].append(str(setting))
    for because, void in given_way.items():
        print(
            f"note: no effect {because}, so left at the default: {', '.join(void)}", file=sys.stderr
        )
    return kept


def unmet(field: dataclasses.Field, settings: Mapping[str, Setting]) -> Clause | str:
    """Why a field can have no effect: ``never``'s reason, or the clause of ``needs`` that fails."""
    if reason := field.metadata.get("never"):
        return reason
    for clause in field.metadata.get("needs", ()):
        if clause.keys() <= settings.keys() and not any(
            _is(settings[name].value, wanted) for name, wanted in clause.items()
        ):
            return clause
    return {}


def _is(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Above | Below):
        return wanted.holds(value)
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def _gives_way(setting: Setting, why: Clause | str, settings: Mapping[str, Setting]) -> bool:
    """Whether a void setting is dropped and not refused."""
    if setting.source == COMMAND_LINE:
        return False
    causes = () if isinstance(why, str) else why
    return any(settings[name].source == COMMAND_LINE for name in causes)


def _because(why: Clause | str, settings: Mapping[str, Setting]) -> str:
    """``while batch_tokens is 2048 (from recipe.json)``."""
    if isinstance(why, str):
        return f"here, because {why}"
    return "while " + " and ".join(map(_is_what, (settings[name] for name in why)))


def _is_what(setting: Setting) -> str:
    field, value, source = setting.field, setting.value, setting.source
    text = field.metadata["unset"] if value is None else shown(value)
    return f"{field.name} is {text} ({source if source == DEFAULT else f'from {source}'})"


def _remedy(why: Clause | str) -> str:
    """``leave it out, or set --batch-tokens 0``."""
    if isinstance(why, str):
        return "leave it out"
    return " or ".join(["leave it out,", *(_to_set(name, wanted) for name, wanted in why.items())])


def _to_set(name: str, wanted: Any) -> str:
    if wanted is False or wanted == "":
        return f"leave {flag_of(name)} out"
    return f"set {flag_of(name)} {_text(wanted)}"


# ------------------------------------------------------------------------------ running a script


def run_main(
    main: Callable[[Sequence[str] | None], int | None], parallel: bool = False
) -> typing.NoReturn:
    """Run a script's ``main`` and turn what a user can cause into one line and an exit code.

    Args:
        parallel: it may be one of several processes that a launcher has started.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no character of a path is worth a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        with together() if parallel else contextlib.nullcontext():
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
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed for {sys.executable}; {SET_UP}", file=sys.stderr
        )
        code = 2
    except RuntimeError as error:  # torch's out-of-memory errors have no common base class
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        on_device = "" if "can't allocate memory" in str(error) else ", or --device cpu"
        print(f"error: {OUT_OF_MEMORY}{on_device}", file=sys.stderr)
        code = 2
    _let_go_of_output()
    if parallel and is_launched():
        sys.stderr.flush()
        os._exit(code)  # once in some fifty runs, torch's threads aborted the interpreter's own end
    sys.exit(code)


def _let_go_of_output() -> None:
    """Drop what standard output refuses; Python would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    return " ".join(str(error).split())
