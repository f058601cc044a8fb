"""Specs without TileLang, for a process that only runs programs that are compiled already: importing TileLang takes most of a second.

The file of a kernel holds its spec and its program, and names TileLang at the top. Once :func:`defer` was called, such a file gets a
stand-in for ``tilelang.language``. The first that asks the stand-in for anything, as building a program does, imports TileLang, which then
takes the stand-in's place in every file. The files themselves stay as they are, since their text tells whether a profile is stale
(Kernel.source_hash).
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

_PACKAGE = "tl_kernels."
_LANGUAGE = "tilelang.language"
_LOCK = threading.RLock()
_deferring = False
_waiting: list[ModuleType] = []


def defer() -> None:
    """From now on importing a kernel through ``tl_kernels.KERNELS`` does not import TileLang, unless something else has done so."""
    global _deferring
    _deferring = True


def load(name: str) -> ModuleType:
    """The module ``tl_kernels.<kernel>``."""
    with _LOCK:
        if name in sys.modules or not _deferring or "tilelang" in sys.modules:
            return importlib.import_module(name)
        return _load(name)


class _Macro:
    """A ``@T.macro`` at the top of a file, until there is a ``T``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.made = function, None

    def make(self, language: Any) -> Any:
        """One macro, however many files take it from the one that defines it."""
        if self.made is None:
            self.made = language.macro(self.function)
        return self.made


class _StandIn:
    macro = _Macro

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what inspect and pickle look for is not there
            raise AttributeError(name)
        return getattr(_arrive(), name)


_STAND_IN = _StandIn()


def _arrive() -> Any:
    """Import TileLang and put it where the stand-in is."""
    with _LOCK:
        language = importlib.import_module(_LANGUAGE)
        for module in _waiting:
            for name, value in list(vars(module).items()):
                if value is _STAND_IN:
                    setattr(module, name, language)
        # only now: TileLang looks at a macro's annotations in the globals of its file
        for module in _waiting:
            for name, value in list(vars(module).items()):
                if isinstance(value, _Macro):
                    setattr(module, name, value.make(language))
        _waiting.clear()
        return language


def _load(name: str) -> ModuleType:
    """Import a file of this package with an ``import`` of its own, which no other file and no other thread sees."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = importlib.util.module_from_spec(spec)
    vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
    sys.modules[name] = module
    _waiting.append(module)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        _waiting.remove(module)
        del sys.modules[name]
        raise
    package, _, child = name.rpartition(".")
    setattr(sys.modules[package], child, module)
    return module


def _import(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    if name == _LANGUAGE and not fromlist:  # import tilelang.language as T
        return SimpleNamespace(language=_STAND_IN)
    if level == 0 and name.startswith(_PACKAGE):
        load(name)
    return builtins.__import__(name, globals, locals, fromlist or (), level)
