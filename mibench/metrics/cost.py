"""What a defense costs the client: computation, parameters and traffic."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


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
    if example.ndim < 2 or example.shape[0] != 1:
        raise ValueError(f"example must be a batch of one image, got shape {tuple(example.shape)}")
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
