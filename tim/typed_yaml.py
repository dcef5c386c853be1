"""YAML files with a schema: inherit, override, and turn into dataclasses whose annotations are checked.

Every key is a field of a dataclass; anything else is an error that names the key's path and the nearest valid one.
Annotations beyond plain types: `Literal[...]` for choices, `Annotated[int, "> 0"]` for bounds.
"""

import dataclasses
import difflib
import importlib
import inspect
import itertools
import operator
import os
import sys
import types
import typing
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REQUIRED = dataclasses.MISSING
BOUNDS = {">": operator.gt, ">=": operator.ge}
T = TypeVar("T", bound="DataclassInstance")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key's path, the value and the fix."""


@dataclasses.dataclass
class Target:
    """A class by its import path and its constructor keywords."""

    target: str
    params: dict[str, Any] = dataclasses.field(default_factory=dict)

    def resolve(self) -> type:
        """Import the class; modules of the current folder are found too, after the installed ones."""
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        module, _, name = self.target.rpartition(".")
        return getattr(importlib.import_module(module), name)

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Construct the class with params."""
        return self.resolve()(*args, **self.params, **kwargs)

    def argument(self, name: str) -> Any:
        """A keyword as `build` would pass it, or its default; None when the constructor has no such keyword."""
        if name in self.params:
            return self.params[name]
        keyword = constructor_keywords(self.resolve()).get(name)
        return None if keyword is None or keyword.default is keyword.empty else keyword.default

    def check(self, path: str, given: Collection[str] = (), keys: str = ".params") -> None:
        """ConfigError unless the class can be imported and its constructor takes params.

        Args:
            path: of the target in its file, for messages.
            given: keywords that come from elsewhere, and therefore not from the file.
            keys: where params stand in the file, after path.
        """
        try:
            cls = self.resolve()
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{path}.target={self.target!r} cannot be imported: {error}") from error
        if not isinstance(cls, type):
            raise ConfigError(f"{path}.target={self.target!r} is no class")
        check_keywords(cls, self.params, path + keys, given)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The nested dictionary of a YAML file over its `base`, with `a.b=c` overrides on top, not yet validated.

    Args:
        path: the file. Its key `base` names a file, relative to it, whose keys it takes over where it has none of its own;
            mappings are merged key by key, anything else is replaced, and so are the `params` of another `target`.

    Raises:
        FileNotFoundError: when there is no such file.
        ConfigError: when it is no YAML, an override has another form, or files are each other's base.
    """
    bad = [o for o in overrides if "=" not in o or o.startswith("=")]
    if bad:
        raise ConfigError(f"override {bad[0]!r} is not of the form a.b=c")
    trees = _load_with_bases(Path(path))
    try:
        for lower, upper in itertools.combinations(trees, 2):
            _forget_params(lower, upper)
        merged = OmegaConf.merge(*trees, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error


def _load_with_bases(path: Path, heirs: Sequence[Path] = ()) -> list[DictConfig | ListConfig]:
    """The chain of a file, its last base first; `heirs` are the files that led here."""
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}" + (f", which is the base of {heirs[-1]}" if heirs else ""))
    chain = [*heirs, path.resolve()]
    if chain[-1] in heirs:
        raise ConfigError(f"{path}: base leads back to it: {' -> '.join(map(str, chain))}")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # the errors of the YAML parser and of OmegaConf share no base class
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    base = tree.pop("base", None) if isinstance(tree, DictConfig) else None
    return [tree] if base is None else [*_load_with_bases(path.parent / str(base), chain), tree]


def _forget_params(lower: Any, upper: Any) -> None:
    """Drop the params of a target in `lower` where `upper` names another, to whose class they mean nothing."""
    if not isinstance(lower, DictConfig) or not isinstance(upper, DictConfig):
        return
    if "target" in upper and upper.target != lower.get("target"):
        lower.pop("params", None)
    for key in lower.keys() & upper.keys():
        _forget_params(lower[key], upper[key])


def build_typed(cls: type[T], tree: Any, path: str = "", ignored: Collection[str] = ()) -> T:
    """A dataclass from a nested dictionary.

    Args:
        path: of the dictionary in its file, for messages.
        ignored: paths of keys that are accepted without effect.

    Raises:
        ConfigError: for an unknown or missing key, a wrong type or a value that its annotation does not allow.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'the file'} must be a mapping, got {tree!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in tree.items():
        here = f"{path}.{key}".lstrip(".")
        if here in ignored:
            warnings.warn(f"{here} has no effect and is ignored", stacklevel=2)
        elif key not in fields:
            raise ConfigError(f"unknown key {here}{nearest(str(key), fields)}")
        else:
            values[key] = _convert(value, hints[key], here, ignored)
    for name, f in fields.items():
        if name not in values and f.default is REQUIRED and f.default_factory is REQUIRED:
            raise ConfigError(f"{f'{path}.{name}'.lstrip('.')} is missing")
    return cls(**values)


def _convert(value: Any, hint: Any, path: str, ignored: Collection[str] = ()) -> Any:
    """Check one value against its annotation; ints pass for floats, nothing else is converted."""
    if get_origin(hint) is Annotated:
        hint, bound = get_args(hint)
        value, (sign, limit) = _convert(value, hint, path), bound.split()
        if value is not None and not BOUNDS[sign](value, float(limit)):
            raise ConfigError(f"{path} must be {bound}, got {value}")
        return value
    if get_origin(hint) is Literal:
        value = "no" if value is False else value  # what YAML makes of an unquoted no
        if value not in get_args(hint):
            raise ConfigError(f"{path}={value!r} is not one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        kinds = [h for h in get_args(hint) if h is not type(None)]
        hint = next((h for h in kinds if isinstance(value, get_origin(h) or h)), kinds[0]) if len(kinds) > 1 else kinds[0]
        return _convert(value, hint, path, ignored)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build_typed(hint, value, path, ignored)
    if get_origin(hint) is list and isinstance(value, list):
        return [_convert(v, get_args(hint)[0], f"{path}[{i}]") for i, v in enumerate(value)]
    if get_origin(hint) is dict and value is None:
        return {}
    kind = get_origin(hint) or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value


def check_keywords(cls: type, params: Mapping[str, Any], path: str, given: Collection[str] = ()) -> None:
    """Compare keys with the keywords of a constructor, but those `given` elsewhere, and values with their annotations."""
    valid = {name: keyword.annotation for name, keyword in constructor_keywords(cls).items() if name not in given}
    for key, value in params.items():
        if key not in valid:
            raise ConfigError(f"unknown key {path}.{key}{nearest(key, valid)}")
        hint = valid[key]
        simple = [h for h in (get_args(hint) or (hint,)) if h in (int, float, str, bool)]
        if simple and not (value is None and type(None) in get_args(hint)):
            _convert(value, simple[0], f"{path}.{key}")


def constructor_keywords(cls: type) -> dict[str, inspect.Parameter]:
    """Keywords of a constructor, through **kwargs its bases' too; annotations outside this package are not read (`Any`)."""
    keywords: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        arguments = inspect.signature(vars(base)["__init__"]).parameters.values()
        hints = get_type_hints(vars(base)["__init__"]) if base.__module__.startswith("tim.") else {}
        named = [a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY) and a.name != "self"]
        keywords = {a.name: a.replace(annotation=hints.get(a.name, Any)) for a in named} | keywords
        if not any(a.kind is a.VAR_KEYWORD for a in arguments):
            break
    return keywords


def nearest(key: str, valid: Iterable[str]) -> str:
    """End of an error message: the most similar valid word, or all of them when none is similar."""
    valid = sorted(valid)
    match = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else f"; valid: {', '.join(valid)}"
