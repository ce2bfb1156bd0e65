"""Gradient checkpointing within an estimator: what is computed again in a backward pass is computed as it was the first time.

torch.utils.checkpoint looks up two names of its own when it is called; while a block below is open they are others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace

import torch.utils.checkpoint as checkpointing

from .threads import Shared, replaced

Start = Callable[[], Callable[[], AbstractContextManager]]

_GENERATOR = "_checkpoint_without_reentrant_generator"
_GENERATOR += "_impl" if hasattr(checkpointing, f"{_GENERATOR}_impl") else ""  # its name from torch 2.14 on
_originals = {}


class _OfThisThread(threading.local):
    starts: tuple[Start, ...] = ()
    plain = False


_here = _OfThisThread()


class recomputed_in:  # noqa: N801, a block like those that contextmanager makes
    """Segments that are checkpointed within the block, by this thread, are computed again in the context that start() makes.

    start() is called where a segment begins, and what it returned where it is computed again, in whatever thread. Segments of
    the reentrant kind, which torch.autograd.grad refuses, are made such of the other kind.
    """

    def __init__(self, start: Start):
        self.start = start

    def __enter__(self) -> None:
        _patched.__enter__()
        self.before = _here.starts
        _here.starts = (*self.before, self.start)

    def __exit__(self, *error) -> None:
        _here.starts = self.before
        _patched.__exit__(*error)


@contextmanager
def not_recomputed() -> Iterator[None]:
    """Nothing is checkpointed within the block: graphs are kept, as forward mode needs them."""
    before, _here.plain = _here.plain, True
    try:
        with _patched:
            yield
    finally:
        _here.plain = before


def _generator(function: Callable, *rest, **options):
    if _here.plain:
        return _nothing()
    return _originals[_GENERATOR](_placed(function), *rest, **options)


def _nothing():
    """Before the segment, and after it."""
    yield


def _reentrant(function: Callable, preserve_rng_state: bool, *args):
    if _here.plain:
        return function(*args)
    if not _here.starts:  # another thread's block
        return _originals["CheckpointFunction"].apply(function, preserve_rng_state, *args)
    return checkpointing.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _placed(function: Callable) -> Callable:
    """`function`, which is called again only, in the contexts that belong to the place where the segment begins."""
    contexts = [start() for start in _here.starts]
    if not contexts:
        return function

    def again(*args, **kwargs):
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return function(*args, **kwargs)

    return again


@Shared
@contextmanager
def _patched() -> Iterator[None]:
    others = {_GENERATOR: _generator, "CheckpointFunction": SimpleNamespace(apply=_reentrant)}
    _originals.update((name, getattr(checkpointing, name)) for name in others)
    with replaced(*((checkpointing, name, other) for name, other in others.items())):
        yield
