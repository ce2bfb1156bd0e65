"""Changes of torch that every thread sees: the first block that needs them makes them, the last one takes them back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

# Torch's random numbers and levels of forward mode are one for all threads: one estimator at a time.
one_at_a_time = threading.RLock()


class Shared:
    """A block that may be open several times at once, in several threads: it begins with the first and ends with the last."""

    def __init__(self, block: Callable[[], AbstractContextManager]):
        self.block, self.lock, self.open, self.stack = block, threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.open == 0:
                self.stack.enter_context(self.block())
            self.open += 1

    def __exit__(self, *error) -> None:
        with self.lock:
            self.open -= 1
            if self.open == 0:
                self.stack.close()


@contextmanager
def replaced(*attributes: tuple[object, str, object]) -> Iterator[None]:
    """Within the block, each (object, name of its attribute, another value for that)."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in attributes]
    try:
        for owner, name, value in attributes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
