"""Random numbers: seeds that come from the host, and what losses draw (dropout, say), drawn again or anew."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack


def on_the_host():
    """A block in which tensors are real, and no mode sees them."""
    return _disable_current_modes() if _get_current_dispatch_mode_stack() else nullcontext()


def draw_seeds(shape: tuple[int, ...], generator: torch.Generator | None) -> list:
    """Seeds from a generator on the host, torch's global one if None: real numbers under FakeTensorMode too."""
    with on_the_host():
        return torch.randint(2**62, shape, generator=generator, device="cpu").tolist()


def drawn_from(seed: int, n: int) -> list[int]:
    """n further seeds, which depend on this one alone."""
    return draw_seeds((n,), torch.Generator().manual_seed(seed))


MARK = 0x0E70_6AAD  # an initial seed that nobody sets
_own: WeakKeyDictionary[nn.Module, torch.Generator] = WeakKeyDictionary()


@contextmanager
def unseeded(model: nn.Module, generator: torch.Generator | None):
    """A block whose losses may set a seed (torch.manual_seed): the generator to draw seeds from, torch's global one if None.

    What is drawn after such a loss would be the same in every call: from then on a model's seeds come from a stream of its own,
    which begins where the global one stood at the first call.
    """
    if generator is not None or model in _own:
        yield generator or _own[model]
        return
    with on_the_host():
        begin = torch.get_rng_state()
        marked = begin.clone()
        marked[:8] = torch.tensor([MARK], device="cpu").view(torch.uint8)  # the initial seed, which no draw depends on
        torch.set_rng_state(marked)
    try:
        yield None
    finally:
        with on_the_host():
            if torch.initial_seed() == MARK:
                state = torch.get_rng_state()
                state[:8] = begin[:8]
                torch.set_rng_state(state)
            else:
                there = torch.Generator()
                there.set_state(begin)
                _own[model] = torch.Generator().manual_seed(*draw_seeds((1,), there))


class Draws:
    """What losses draw from torch's generators: drawn again, or anew."""

    def __init__(self, cuda_devices: Iterable[torch.device]):
        self.cuda_devices = sorted(cuda_devices, key=str)

    def state(self, seed: int | None = None) -> list[Tensor]:
        """The state of torch's generators, or what `seed` would make it."""
        with on_the_host():
            if seed is not None:
                return [torch.Generator(d).manual_seed(seed).get_state() for d in ("cpu", *self.cuda_devices)]
            return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.cuda_devices)]

    def replay(self, state: list[Tensor] | None) -> AbstractContextManager:
        """A block that draws again what was drawn from `state` on, then goes on from here; None draws anew."""
        return nullcontext() if state is None else self._replayed(state)

    @contextmanager
    def _replayed(self, state: list[Tensor]):
        here = self.state()
        self._set(state)
        try:
            yield
        finally:
            self._set(here)

    def _set(self, state: list[Tensor]) -> None:
        with on_the_host():
            torch.set_rng_state(state[0])
            for device, s in zip(self.cuda_devices, state[1:]):
                torch.cuda.set_rng_state(s, device)


class Occasions:
    """Blocks by key: those of one key draw the same random numbers.

    known: states by key that are agreed on before, between processes. A key that has none draws anew, and with `again` the next
    block of that key draws the same.
    """

    def __init__(self, draws: Draws, known: Mapping[Hashable, list[Tensor]] = {}):  # noqa: B006, which is read alone
        self.draws, self.known = draws, dict(known)

    @contextmanager
    def first(self, key: Hashable):
        """A block that others of its key are to draw like, if it is entered at all."""
        with self.of(key, again=True):
            yield

    def of(self, key: Hashable, again: bool = False) -> AbstractContextManager:
        state = self.known.get(key)
        if state is None and again:
            self.known[key] = self.draws.state()
        return self.draws.replay(state)
