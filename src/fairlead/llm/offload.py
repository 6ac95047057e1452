"""What lies on a CUDA device and waits on the host while its model sleeps.

It moves storage by storage, so that every tensor, and every view of one, is what it was when it is back; only the addresses are others.
"""

import gc
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20
"""Of pinned memory: torch rounds what is pinned up to a power of two."""


class Offloaded:
    """Storages without memory, and the host's copy of what they held."""

    def __init__(self, tensors: Iterable[Tensor], *, pinned: bool) -> None:
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors) if storage.nbytes()}
        self._storages = [(storage, storage.nbytes()) for storage in storages.values()]
        self.nbytes = sum(nbytes for _, nbytes in self._storages)
        self._chunks = [
            torch.empty(min(CHUNK_BYTES, self.nbytes - begin), dtype=torch.uint8, pin_memory=pinned)
            for begin in range(0, self.nbytes, CHUNK_BYTES)
        ]
        for device, host in self._pieces():
            host.copy_(device, non_blocking=True)
        self._finish()
        for storage, _ in self._storages:
            storage.resize_(0)

    def restore(self) -> None:
        """Raises RuntimeError where the device has not as much memory left."""
        for storage, nbytes in self._storages:
            storage.resize_(nbytes)
        for device, host in self._pieces():
            device.copy_(host, non_blocking=True)
        self._finish()

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every byte of the storages, and where it lies on the host."""
        at = 0
        for storage, nbytes in self._storages:
            whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            done = 0
            while done < nbytes:
                chunk, offset = divmod(at, CHUNK_BYTES)
                num = min(nbytes - done, CHUNK_BYTES - offset)
                yield whole[done : done + num], self._chunks[chunk][offset : offset + num]
                done, at = done + num, at + num

    def _finish(self) -> None:
        """Copies have been made."""
        for device in {storage.device for storage, _ in self._storages if storage.device.type == "cuda"}:
            torch.cuda.synchronize(device)


def offload_device() -> Offloaded:
    """All that this process has on CUDA devices: one model's engine has a process of its own."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.is_cuda]
    offloaded = Offloaded(tensors, pinned=True)
    torch.cuda.empty_cache()
    return offloaded
