"""YAML files with a schema: inherit, override, and turn into dataclasses whose annotations are checked.

Every key is a field of a dataclass; anything else is an error that names the key's path and the nearest valid one.
Annotations beyond plain types: `Literal[...]` for choices, `Annotated[int, "> 0", "<= 9"]` for bounds. Files may come from
anywhere: they run no code, read no environment, and what would grow without end when it is read is refused.
"""

import dataclasses
import difflib
import itertools
import math
import operator
import os
import re
import types
import typing
import warnings
from collections.abc import Collection, Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REQUIRED = dataclasses.MISSING
BOUNDS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_LETTERS = 1 << 18, 20_000, 40, 4096  # of a file, a file, a file, a word
LARGEST = 2**63 - 1
REFERENCE = re.compile(r"\$\{([\w-]+(?:\.[\w-]+)*)\}")
PositiveInt = Annotated[int, "> 0"]
NotNegative = Annotated[int, ">= 0"]
PositiveFloat = Annotated[float, "> 0"]
Fraction = Annotated[float, ">= 0", "<= 1"]
T = TypeVar("T", bound="DataclassInstance")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key's path, the value and the fix."""


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
    tree = reduce(_merge, _load_with_bases(Path(path)))
    for override in overrides:
        key, _, text = override.partition("=")
        value = _parse(text, f"override {shown(override)}")
        tree = _merge(tree, reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value), forget=False)
    _check_references(tree, str(path))
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except Exception as error:  # OmegaConf's errors share no base class
        raise ConfigError(f"{path}: {first_line(error)}") from error


def _load_with_bases(path: Path, heirs: Sequence[Path] = ()) -> list[Any]:
    """The chain of a file, its last base first; `heirs` are the files that led here."""
    if not os.path.isfile(path):  # false, too, for what is no possible path
        raise FileNotFoundError(f"no config file {path}" + (f", which is the base of {heirs[-1]}" if heirs else ""))
    chain = [*heirs, path.resolve()]
    if chain[-1] in heirs or len(chain) > MAX_DEPTH:
        raise ConfigError(f"{path}: base leads back to it: {' -> '.join(map(str, chain))}")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes, more than the {MAX_BYTES} of any configuration")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    tree = _parse(text, str(path))
    base = tree.pop("base", None) if isinstance(tree, dict) else None
    return [tree] if base is None else [*_load_with_bases(path.parent / str(base), chain), tree]


def _parse(text: str, name: str) -> Any:
    """Plain mappings, lists and values of YAML, references not yet resolved.

    Raises:
        ConfigError: when it is none, or would become too large by aliases and merges.
    """
    visited = itertools.count()

    def measure(node: yaml.Node, depth: int) -> None:
        if next(visited) > MAX_NODES or depth > MAX_DEPTH:
            raise ConfigError(f"{name} holds more than {MAX_NODES} values (aliases count), or more than {MAX_DEPTH} in another")
        if isinstance(node, yaml.CollectionNode):
            for entry in node.value:
                for child in entry if isinstance(entry, tuple) else (entry,):
                    measure(child, depth + 1)

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # where an alias costs nothing yet
        if root is not None:
            measure(root, 0)
        # Of the ways to have OmegaConf parse, the one that takes any value, and mappings too.
        tree: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"tree={text}"]), resolve=False)
        return tree["tree"]
    except ConfigError:
        raise
    except Exception as error:  # the errors of the YAML parser and of OmegaConf share no base class
        raise ConfigError(f"{name} is not valid YAML: {first_line(error)}") from error


def _merge(lower: Any, upper: Any, forget: bool = True) -> Any:
    """`upper` over `lower`, mappings key by key.

    Args:
        forget: leave out the params of a target in `lower` where `upper` names another, to whose class they mean nothing.
    """
    if not isinstance(lower, dict) or not isinstance(upper, dict):
        return upper
    if forget and "target" in upper and upper["target"] != lower.get("target"):
        lower = {key: value for key, value in lower.items() if key != "params"}
    return lower | {key: _merge(lower.get(key), value, forget) for key, value in upper.items()}


def _check_references(tree: Any, name: str) -> None:
    """ConfigError unless keys are words and `${a.b}`, the only interpolation that is known, leads to values of a sane size."""
    visited = itertools.count()

    def visit(value: Any, path: str, trail: tuple[str, ...] = ()) -> None:
        if next(visited) > MAX_NODES:
            raise ConfigError(f"{name} holds more than {MAX_NODES} values (references count)")
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str) or not key.isprintable() or len(key) > 100 or "${" in key:
                    raise ConfigError(f"{name}: {shown(key)} in {path or 'it'} is no word, which keys are")
                visit(inner, f"{path}.{key}".lstrip("."), trail)
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                visit(inner, f"{path}[{i}]", trail)
        elif isinstance(value, str):
            if len(value) > MAX_LETTERS:
                raise ConfigError(f"{name}: {path} has {len(value)} letters, more than {MAX_LETTERS}")
            if "${" in REFERENCE.sub("", value):
                raise ConfigError(f"{name}: {path}={shown(value)}: only ${{a.b}}, another key, is known")
            for key in REFERENCE.findall(value):
                if key in trail:
                    raise ConfigError(f"{name}: {path}={shown(value)} leads back to itself")
                visit(_look_up(tree, key, f"{name}: {path}={shown(value)}"), path, (*trail, key))

    visit(tree, "")


def _look_up(tree: Any, key: str, place: str) -> Any:
    """What stands at `a.b` of a tree."""
    for name in key.split("."):
        try:
            tree = tree[int(name)] if isinstance(tree, list) else tree[name]
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{place}: there is no {key}") from error
    return tree


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def build_typed(cls: type[T], tree: Any, path: str = "", ignored: Collection[str] = ()) -> T:
    """A dataclass from a nested dictionary.

    Args:
        path: of the dictionary in its file, for messages.
        ignored: paths of keys that are accepted without effect.

    Raises:
        ConfigError: for an unknown or missing key, a wrong type or a value that its annotation does not allow.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'the file'} must be a mapping, got {shown(tree)}")
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
            values[key] = convert(value, hints[key], here, ignored)
    for name, f in fields.items():
        if name not in values and f.default is REQUIRED and f.default_factory is REQUIRED:
            raise ConfigError(f"{f'{path}.{name}'.lstrip('.')} is missing")
    return cls(**values)


def convert(value: Any, hint: Any, path: str, ignored: Collection[str] = ()) -> Any:
    """Check one value against its annotation; ints pass for floats, nothing else is converted.

    Raises:
        ConfigError: for a wrong type, a value that the annotation does not allow, and numbers that are not finite.
    """
    if get_origin(hint) is Annotated:
        hint, *bounds = get_args(hint)
        value = convert(value, hint, path)
        signs = [bound.split() for bound in bounds]
        if value is not None and not all(BOUNDS[sign](value, float(limit)) for sign, limit in signs):
            raise ConfigError(f"{path} must be {' and '.join(bounds)}, got {value}")
        return value
    if get_origin(hint) is Literal:
        value = "no" if value is False else value  # what YAML makes of an unquoted no
        if value not in get_args(hint):
            raise ConfigError(f"{path}={shown(value)} is not one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) in (typing.Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        kinds = [h for h in get_args(hint) if h is not type(None)]
        return convert(value, next((h for h in kinds if isinstance(value, plain_kind(h))), kinds[0]), path, ignored)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build_typed(hint, value, path, ignored)
    kind, inner = plain_kind(hint), get_args(hint)
    if kind is dict and value is None:
        return {}
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        raise ConfigError(f"{path} must be {kind.__name__}, got {shown(value)} ({type(value).__name__})")
    if isinstance(value, list):
        return [convert(v, inner[0] if inner else Any, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict):
        return {k: convert(v, inner[1] if inner else Any, f"{path}.{k}") for k, v in value.items()}
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) > LARGEST):
        raise ConfigError(f"{path} must be a finite number of at most 64 bits, got {shown(value)}")
    return value


def plain_kind(hint: Any) -> type:
    """The class that values of an annotation have: int of `Annotated[int, "> 0"]`, list of `list[int]`, object of Any."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    kind = get_origin(kind) or kind
    return kind if isinstance(kind, type) and kind is not Any else object


def nearest(key: str, valid: Iterable[str]) -> str:
    """End of an error message: the most similar valid word, or all of them when none is similar."""
    valid = sorted(valid)
    match = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else f"; valid: {', '.join(valid)}"
