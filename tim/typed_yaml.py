"""YAML files with a schema: inherit, override, and turn into dataclasses whose annotations are checked.

Every key is a field of a dataclass; anything else is an error that names the key's path and the nearest valid one.
Annotations beyond plain types: `Literal[...]` for choices, `Annotated[int, "> 0", "<= 9"]` for bounds. Files may come from
anywhere: they run no code, read no environment, and what would grow without end when it is read is refused.
"""

import dataclasses
import difflib
import itertools
import operator
import os
import re
import types
import typing
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REQUIRED = dataclasses.MISSING
BOUNDS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
MAX_BYTES = 1 << 18  # of a file
MAX_NODES, MAX_DEPTH = 20_000, 40  # values of a file, and how many lie in each other
MAX_LETTERS = 4096  # of a value, as of a path
LARGEST = {int: 2**63 - 1, float: 3.4e38}  # what tensors hold
REFERENCE = re.compile(r"\$\{([\w-]+(?:\.[\w-]+)*)\}")
PositiveInt = Annotated[int, "> 0"]
NotNegative = Annotated[int, ">= 0"]
ImageSide = Annotated[int, "> 0", "<= 65536"]  # in pixels
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
        raise ConfigError(f"override {shown(bad[0])} is not of the form a.b=c")
    tree = reduce(_merge, _load_with_bases(Path(path)), None)
    for override in overrides:
        key, _, text = override.partition("=")
        value = _parse(text, f"override {shown(override)}")
        tree = _merge(tree, reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value), forget=False)
    return _resolve(tree, str(path))


def _load_with_bases(path: Path, heirs: Sequence[Path] = ()) -> list[Any]:
    """The chain of a file, its last base first; `heirs` are the files that led here."""
    if not os.path.isfile(path):  # false, too, for what is no possible path
        whose = f", which is the base of {heirs[-1]}" if heirs else ""
        raise FileNotFoundError(f"no config file {shown(str(path))[1:-1]}{whose}")
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


class _Loader(yaml.SafeLoader):
    """PyYAML's, which takes 1e-4 for a word and 2026-01-31 for a date."""

    yaml_implicit_resolvers: ClassVar = {
        letter: [(tag, pattern) for tag, pattern in kinds if tag.rpartition(":")[2] not in ("float", "timestamp")]
        for letter, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _parse(text: str, name: str) -> Any:
    """Plain mappings, lists and values of YAML, references not yet resolved.

    Raises:
        ConfigError: when it is none, has a key twice, or would become too large by aliases and merges.
    """
    visited = itertools.count()

    def measure(node: yaml.Node, depth: int = 0) -> None:
        if next(visited) > MAX_NODES or depth > MAX_DEPTH:
            raise ConfigError(f"{name} holds more than {MAX_NODES} values (aliases count), or {MAX_DEPTH} in each other")
        inner: Iterable[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = [key for key, count in keys.items() if count > 1]
            if twice:
                raise ConfigError(f"{name} is not valid YAML: the key {shown(twice[0])} stands twice in a mapping")
            inner = itertools.chain(*node.value)
        for child in inner:
            measure(child, depth + 1)

    try:
        loader = _Loader(text)
        node = loader.get_single_node()  # where an alias costs nothing yet
        if node is None:
            return None
        measure(node)
        return loader.construct_document(node)
    except ConfigError:
        raise
    except Exception as error:  # of PyYAML's constructors: anything
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error


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


def _resolve(tree: Any, name: str) -> Any:
    """The tree with the values of other keys in place of `${a.b}`, the only interpolation that is known.

    Raises:
        ConfigError: for keys that are no words, references that lead nowhere or back, and what grows out of all proportion.
    """
    visited = itertools.count()

    def visit(value: Any, path: str, depth: int = 0, trail: tuple[str, ...] = ()) -> Any:
        if next(visited) > MAX_NODES or depth > MAX_DEPTH:
            raise ConfigError(f"{name} holds more than {MAX_NODES} values (references count), or {MAX_DEPTH} in each other")
        if isinstance(value, list):
            return [visit(inner, f"{path}[{i}]", depth + 1, trail) for i, inner in enumerate(value)]
        if isinstance(value, dict):
            wrong = [key for key in value if not isinstance(key, str) or not key.isprintable() or len(key) > 100]
            if wrong:
                raise ConfigError(f"{name}: the key {shown(wrong[0])} in {path or 'it'} is no word")
            return {key: visit(inner, f"{path}.{key}".lstrip("."), depth + 1, trail) for key, inner in value.items()}
        if not isinstance(value, str):
            return value
        here = f"{name}: {path}={shown(value)}"

        def follow(match: re.Match[str]) -> Any:
            if match[1] in trail:
                raise ConfigError(f"{here} leads back to itself")
            return visit(_look_up(tree, match[1], here), path, depth + 1, (*trail, match[1]))

        if match := REFERENCE.fullmatch(value):
            return follow(match)
        text = REFERENCE.sub(lambda match: str(follow(match)), value)
        if "${" in text:
            raise ConfigError(f"{here}: only ${{a.b}}, another key, is known")
        if len(text) > MAX_LETTERS:
            raise ConfigError(f"{here} has {len(text)} letters, more than {MAX_LETTERS}")
        return text

    return visit(tree, "")


def _look_up(tree: Any, key: str, place: str) -> Any:
    """What stands at `a.b` of a tree."""
    for name in key.split("."):
        try:
            tree = tree[int(name)] if isinstance(tree, list) else tree[name]
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{place}: there is no {key}") from error
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dictionary by dotted name; an empty dictionary is a leaf."""
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    return {name: leaf for key, value in tree.items() for name, leaf in flatten(value, f"{prefix}{key}.").items()}


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
        for bound in bounds if value is not None else ():
            sign, limit = bound.split()
            if not BOUNDS[sign](value, float(limit)):
                raise ConfigError(f"{path} must be {bound}, got {value}")
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
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST[int]:
        return float(value)
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        raise ConfigError(f"{path} must be {kind.__name__}, got {shown(value)} ({type(value).__name__})")
    if isinstance(value, list):
        return [convert(v, inner[0] if inner else Any, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict):
        return {k: convert(v, inner[1] if inner else Any, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, int | float) and not abs(value) <= LARGEST[float if isinstance(value, float) else int]:
        raise ConfigError(f"{path} must be a finite number that a tensor can hold, got {shown(value)}")
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
