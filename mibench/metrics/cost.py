"""What a defense costs the client: computation, parameters and traffic."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

PAIRS = 50
"""Pairs of turns in which two clients are timed."""
WARM_UP = 5
"""Pairs before them that do not count."""


def client_cost(module_call: Callable[[Tensor], object], example: Tensor) -> int:
    """Count the floating point operations the client spends on one image.

    The convention is that of ``torch.utils.flop_counter``: a multiply-add counts as 2, and only
    matrix products, convolutions and attention count; activations, normalisation and noise do not.

    Args:
        module_call: What the client runs on its image, such as the client part in eval mode. It is
            called once, without gradients.
        example: One image, (1, 3, H, W); its values do not matter.

    Returns:
        FLOPs per image.

    Raises:
        ValueError: If the example is not a batch of one.
    """
    _check_one_image(example)
    counter = FlopCounterMode(display=False)
    # Some fused kernels of attention are unknown to the counter, which would count them as nothing.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        module_call(example)
    return int(counter.get_total_flops())


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """Count the parameters of several modules, each shared parameter once.

    Args:
        modules: Modules, which may share submodules or parameters.

    Returns:
        Number of scalars in all parameters, trainable or not; buffers do not count.
    """
    distinct = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(distinct.values())


def bytes_on_wire(tensors: Sequence[Tensor]) -> int:
    """Count the bytes that cross the wire for one image, uncompressed.

    Args:
        tensors: All that is sent for one batch, each (N, ...), in the dtype in which it is sent.

    Returns:
        Bytes per image, summed over the tensors.

    Raises:
        ValueError: If there are no tensors, or one has no batch dimension, an empty one, or one
            that differs from the first tensor's.
    """
    if not tensors:
        raise ValueError("bytes_on_wire needs at least one tensor")
    batches = [tensor.shape[0] if tensor.ndim else 0 for tensor in tensors]
    if min(batches) == 0 or len(set(batches)) > 1:
        raise ValueError(
            "all tensors must have the same batch dimension of at least 1, "
            f"got shapes {[tuple(tensor.shape) for tensor in tensors]}"
        )
    return sum(t.numel() * t.element_size() for t in tensors) // batches[0]


def peak_activation_bytes(
    module_call: Callable[[Tensor], object], example: Tensor, modules: Iterable[nn.Module]
) -> int:
    """Measure the most bytes that tensors hold at once while the client works on one image.

    The image and what is returned count, parameters and buffers of the modules do not. Memory is
    seen between operations: what a kernel holds for itself while it runs is not, so a plain loop on
    a small device may need less or more. Views of one memory count once.

    Args:
        module_call: What the client runs on its image. It is called once, without gradients.
        example: One image, (1, 3, H, W); its values do not matter.
        modules: Hold the parameters that are left out.

    Returns:
        Bytes, as of the dtypes and the device at hand.

    Raises:
        ValueError: If the example is not a batch of one.
    """
    _check_one_image(example)
    watch = _Watch(
        tensor for module in modules for tensor in (*module.parameters(), *module.buffers())
    )
    with torch.no_grad(), watch:
        watch.see(example)
        module_call(example)
    return watch.peak


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the memory of all living tensors that operations return."""

    def __init__(self, left_out: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Held by weak references, so that an address is not given to another tensor unseen.
        self._known = {_weak(one): 0 for one in left_out}
        self.peak = 0

    def see(self, result: object) -> None:
        """Notes new memory in a result, and how much is alive now."""
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._known.setdefault(_weak(leaf), leaf.untyped_storage().nbytes())
        self._known = {
            ref: size
            for ref, size in self._known.items()
            if not ref.expired()  # type: ignore[no-untyped-call]
        }
        self.peak = max(self.peak, sum(self._known.values()))

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self.see(result)
        return result


def _weak(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def paired_latencies(
    one: Callable[[], object], other: Callable[[], object], device: torch.device
) -> Tensor:
    """Time two calls by turns, so that what else the machine does meets both.

    Args:
        one: A call without gradients.
        other: The same.
        device: Where they compute; its queue is emptied around each call.

    Returns:
        Seconds, (PAIRS, 2) float64; each pair has its two calls one right after the other, and the
        order changes from pair to pair.
    """
    taken = torch.zeros(WARM_UP + PAIRS, 2, dtype=torch.float64)
    for turn in range(len(taken)):
        for which in (0, 1) if turn % 2 else (1, 0):
            taken[turn, which] = _timed((one, other)[which], device)
    return taken[WARM_UP:]


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_one_image(example: Tensor) -> None:
    if example.ndim < 2 or example.shape[0] != 1:
        raise ValueError(f"example must be a batch of one image, got shape {tuple(example.shape)}")
