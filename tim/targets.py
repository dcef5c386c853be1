"""Classes that a configuration names by their import path, and whose code it may run: ours, optimisers', and what was allowed.

A configuration may come from anywhere, so the path is checked before anything is imported. Modules of one's own need
`--allow-code MODULE` or the environment variable TIM_ALLOW_CODE.
"""

import importlib
import inspect
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from tim.typed_yaml import ConfigError, convert, first_line, nearest, plain_kind, shown

PACKAGES = (
    "tim", "torch.optim", "apex.optimizers", "bitsandbytes.optim", "came_pytorch", "dion", "heavyball", "lion_pytorch", "muon",
    "prodigyopt", "pytorch_optimizer", "schedulefree", "soap", "timm.optim", "torch_optimizer", "torchao.optim",
    "torchao.prototype.low_bit_optim", "transformers.optimization",
)  # fmt: skip
VARIABLE = "TIM_ALLOW_CODE"
_allowed: set[str] = set()  # by --allow-code


def allow_code(modules: str) -> None:
    """Let configurations name classes of these modules (separated by commas) and what is below them, in this process.

    Raises:
        ValueError: for a word that is no module.
    """
    _allowed.update(_module_names(modules))


def allowed_code() -> set[str]:
    """Modules of one's own that configurations may name."""
    return _allowed | _module_names(os.environ.get(VARIABLE, ""))


def _module_names(text: str) -> set[str]:
    """The modules of a list; ValueError for a word that is none."""
    names = {name for name in re.split(r"[\s,:]+", text) if name}
    wrong = [name for name in names if name.endswith(".py") or not all(part.isidentifier() for part in name.split("."))]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no module whose code could be allowed; write my_package.my_module, without .py")
    return names


def _within(name: str, modules: Collection[str]) -> str:
    """The module among these that a dotted name lies in; empty when there is none."""
    return next((module for module in modules if f"{name}.".startswith(f"{module}.")), "")


@contextmanager
def _own_folder(found: bool) -> Iterator[None]:
    """Look for modules in the current folder too, from now on; or not there, where a folder could pose as a known package."""
    here, before = os.getcwd(), list(sys.path)
    if found and here not in before:
        sys.path.append(here)
    elif not found and here in before[1:]:
        sys.path[1:] = [entry for entry in before[1:] if entry != here]
    try:
        yield
    finally:
        if not found:
            sys.path[:] = before


@dataclass
class Target:
    """A class by its import path and its constructor keywords."""

    target: str
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def own_module(self) -> str:
        """The allowed module of one's own that the class is from; empty for a class of `PACKAGES`."""
        return "" if _within(self.target, PACKAGES) else _within(self.target, allowed_code())

    def resolve(self) -> type:
        """Import the class; allowed modules of the current folder are found too, after the installed ones.

        Raises:
            ConfigError: when the path is not allowed, cannot be imported or is no class of these modules.
        """
        module, _, name = self.target.rpartition(".")
        if not module or not all(part.isidentifier() for part in self.target.split(".")):
            raise ConfigError(f"{shown(self.target)} is no import path such as my_module.MyClass")
        own = self.own_module
        if not own and not _within(self.target, PACKAGES):
            raise ConfigError(
                f"{self.target!r} is neither a part of tim nor a known optimiser and is not imported; if you trust it, "
                f"say so: --allow-code {module} (or {VARIABLE}={module})"
            )
        try:
            with _own_folder(bool(own)):
                cls = getattr(importlib.import_module(module), name)
        except Exception as error:
            if own and not isinstance(error, ImportError | AttributeError | ValueError):
                raise  # whose code it is needs to know where
            raise ConfigError(f"{self.target!r} cannot be imported: {first_line(error)}") from error
        if not isinstance(cls, type):
            raise ConfigError(f"{self.target!r} is no class")
        if not own and not _within(cls.__module__, (*PACKAGES, *allowed_code())):
            raise ConfigError(f"{self.target!r} is a class of {cls.__module__}, which configurations may not name")
        return cls

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Construct the class with params.

        Raises:
            ValueError, OSError: the constructor's own, and ConfigError for whatever else it raises.
        """
        cls = self.resolve()
        try:
            return cls(*args, **self.params, **kwargs)
        except (ValueError, OSError):
            raise
        except Exception as error:  # of wrong types or absurd sizes: these have no class in common
            said = f"{type(error).__name__}: {first_line(error)} (TIM_DEBUG=1 says where)"
            raise ConfigError(f"{self.target} cannot be built with {shown(self.params)}: {said}") from error

    def keywords(self) -> dict[str, Any]:
        """All keywords as `build` would pass them, defaults among them, so that writing a default down changes nothing."""
        known = constructor_keywords(self.resolve()).values()
        return {k.name: k.default for k in known if k.default is not k.empty} | self.params

    def argument(self, name: str) -> Any:
        """A keyword as `build` would pass it, or its default; None when the constructor has no such keyword."""
        if name in self.params:
            return self.params[name]
        keyword = constructor_keywords(self.resolve()).get(name)
        return None if keyword is None or keyword.default is keyword.empty else keyword.default

    def check(
        self,
        path: str,
        base: str = "builtins.object",
        methods: Collection[str] = (),
        given: Collection[str] = (),
        keys: str = ".params",
    ) -> None:
        """ConfigError unless this is a class of the kind that its key means, and its constructor takes params.

        Args:
            path: of the target in its file, for messages.
            base: import path of the class that it must inherit from.
            methods: that it must have.
            given: keywords that come from elsewhere, and therefore not from the file.
            keys: where params stand in the file, after path.
        """
        try:
            cls = self.resolve()
        except ConfigError as error:
            raise ConfigError(f"{path}.target={error}") from error
        if not issubclass(cls, pkgutil.resolve_name(base)):
            raise ConfigError(f"{path}.target={self.target!r} is no {base}")
        absent = [name for name in methods if not any(name in vars(parent) for parent in cls.__mro__)]
        if absent:
            raise ConfigError(f"{path}.target={self.target!r} has no method {absent[0]}")
        check_keywords(cls, self.params, path + keys, given)


def check_keywords(cls: type, params: Mapping[str, Any], path: str, given: Collection[str] = ()) -> None:
    """Compare keys with the keywords of a constructor, but those `given` elsewhere, and values with annotations or defaults."""
    valid = {name: keyword for name, keyword in constructor_keywords(cls).items() if name not in given}
    for key, value in params.items():
        here = f"{path}.{key}"
        if key not in valid:
            raise ConfigError(f"unknown key {here}{nearest(key, valid)}")
        hint, default = valid[key].annotation, valid[key].default
        options = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        simple = tuple(option for option in options if plain_kind(option) in (int, float, str, bool))
        listed = [option for option in options if plain_kind(option) is list and isinstance(value, list)]
        if listed:
            convert(value, listed[0], here)
        elif value is not None or type(None) not in options:
            convert(value, typing.Union[simple] if simple else Any, here)  # noqa: UP007  a union of a computed number
        if isinstance(default, tuple) and not simple and value is not None:
            _check_like(value, default, here)


def _check_like(value: Any, default: tuple[Any, ...], path: str) -> None:
    """ConfigError unless a value is a list with as many entries as the default, numbers where that has numbers."""
    if not isinstance(value, list) or len(value) != len(default):
        raise ConfigError(f"{path} must be a list of {len(default)} such as {list(default)}, got {shown(value)}")
    for i, (entry, usual) in enumerate(zip(value, default, strict=True)):
        if isinstance(usual, int | float) and not isinstance(usual, bool):
            convert(entry, float, f"{path}[{i}]")


def constructor_keywords(cls: type) -> dict[str, inspect.Parameter]:
    """Keywords of a constructor, through **kwargs its bases' too; annotations of other packages are not read (`Any`)."""
    keywords: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        arguments = inspect.signature(vars(base)["__init__"]).parameters.values()
        known = _within(base.__module__, ("tim", "torch.optim"))
        hints = get_type_hints(vars(base)["__init__"], include_extras=True) if known else {}
        named = [a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY) and a.name != "self"]
        keywords = {a.name: a.replace(annotation=hints.get(a.name, Any)) for a in named} | keywords
        if not any(a.kind is a.VAR_KEYWORD for a in arguments):
            break
    return keywords
