"""Things that are slow to load, loaded when they are first used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Lazy(Generic[T]):
    """`load(*args, **options)`, called once, when it is first asked for; anew in a process that this is sent to."""

    def __init__(self, load: Callable[..., T], *args: Any, **options: Any) -> None:
        self._how = (load, args, options)
        self._loaded: list[T] = []

    def __call__(self) -> T:
        if not self._loaded:
            load, args, options = self._how
            self._loaded.append(load(*args, **options))
        return self._loaded[0]

    def __getstate__(self) -> dict[str, Any]:
        return {"_how": self._how, "_loaded": []}
