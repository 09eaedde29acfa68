"""Training a module on several ranks, and using one without training it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from trainer.distributed.shared_sums import shared_sums

# The name of the option from PyTorch 2.13 on, and before.
_NAMES = ("forward_sync_buffers", "broadcast_buffers")
_WITHOUT_BUFFERS: dict[str, Any] = {
    next(name for name in _NAMES if name in signature(DistributedDataParallel.__init__).parameters): False
}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for ``module``'s parameters inside; gradients still flow through it to its input."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def freeze_first(module: nn.Module, num: int) -> None:
    """Keep the weights of the first ``num`` layers, in the order in which ``module`` has them. A layer is a module with
    a weight of two or more dimensions; the norm that follows belongs to it.

    Raises:
        ValueError: no layer is left.
    """
    seen = 0
    for part in module.modules():
        if isinstance(part, ParametrizationList):
            continue  # of the layer before, as with spectral normalisation
        own = list(part.parameters(recurse=is_parametrized(part)))
        seen += any(parameter.ndim > 1 for parameter in own)
        if 0 < seen <= num:
            for parameter in own:
                parameter.requires_grad_(False)
    if num >= seen:
        raise ValueError(f"has {seen} layers, of which at most {seen - 1} can be frozen")


def wrap(module: nn.Module, world_size: int, progressive: bool = False) -> nn.Module:
    """``module`` with DistributedDataParallel if there are several ranks.

    Buffers are not broadcast: batch norm's statistics are equal on all ranks anyway (``models.batchnorm``), and a
    broadcast between two forwards of one backward breaks autograd (pytorch#22095).

    Args:
        progressive: layers above the current resolution are not in use yet.
    """
    if world_size == 1:
        return module
    wrapper = DistributedDataParallel(
        module, find_unused_parameters=progressive, gradient_as_bucket_view=True, **_WITHOUT_BUFFERS
    )
    on_cpu = next(module.parameters()).device.type == "cpu"
    if on_cpu and (sums := shared_sums()):
        wrapper.register_comm_hook(None, lambda _, bucket: sums.average(bucket))
    return wrapper


def sync_gradients(module: nn.Module, sync: bool) -> None:
    """Whether DistributedDataParallel averages gradients over ranks in the next backward; to be set before the forward
    (``no_sync`` would be a context for each part of a batch)."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = sync
