"""What is drawn at random: kept as it is, put back, or made to depend on nothing but the step and the batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """What is drawn inside changes nothing outside; with a `seed` it depends on nothing outside either."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield


class RandomState:
    """What PyTorch draws from, as it is when this is created."""

    def __init__(self, device: torch.device):
        self._device = device
        self._state = torch.get_rng_state()
        self._device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """That state in place of the one of now."""
        with random_state_kept(self._device):
            torch.set_rng_state(self._state)
            if self._device_state is not None:
                torch.cuda.set_rng_state(self._device_state, self._device)
            yield


def batch_seed(seed: int, step: int, batch: int) -> int:
    """A seed of its own for every batch of every step, whichever process draws by it."""
    return int(np.random.SeedSequence([seed, step, batch]).generate_state(1)[0])
