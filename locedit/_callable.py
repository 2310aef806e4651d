"""Subpackages that are called like a function, so that `le.localize(...)` works beside `from locedit.localize import
LOCALIZERS`.

Importing `locedit.localize` sets the attribute `localize` of the package `locedit` to the module; nothing can keep a
function of the same
name there. So the module itself is made callable and passes the call on.
"""

import sys
from types import ModuleType
from typing import Any


def make_callable(module: str) -> None:
    """Let the imported `module` be called; the call goes to its function of the same (last) name."""
    function = module.rsplit(".", 1)[-1]

    class Callable(ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return self.__dict__[function](*args, **options)

    sys.modules[module].__class__ = Callable
