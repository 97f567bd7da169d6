"""What decides on reserved bytes on a CUDA card: the allocator's settings, workspaces, and what the driver holds."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from keepless.cost import DeviceSpec
from keepless.machine.allocation import cublas_workspace, expandable_segments


@dataclass(frozen=True, slots=True)
class CardAllocator:
    """The caching allocator of a card, as a plan has to reckon with it.

    Arguments:
        workspaces: bytes of each workspace that torch keeps for a math library.
        expandable: `expandable_segments:True`.
        context: bytes that the driver holds beside torch: the context, kernels, other processes. None where no card
            was asked.
    """

    workspaces: tuple[int, ...] = ()
    expandable: bool = False
    context: int | None = None

    def with_handles(self, count: int) -> CardAllocator:
        """The same with a workspace for so many handles of cuBLAS: one for each thread that multiplies matrices. A
        planned step's segments run in the caller's thread; eager code's backward runs in one of its own.
        """
        return replace(self, workspaces=self.workspaces[:1] * count)


def card_allocator(device: torch.device) -> CardAllocator | None:
    """The allocator of a CUDA device; None on the CPU, and where it is not torch's own (`backend:cudaMallocAsync`)."""
    if device.type != "cuda" or torch.cuda.get_allocator_backend() != "native":
        return None
    major, _ = torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    return _allocator(major, max(0, total - free - torch.cuda.memory_reserved(device)))


def allocator_elsewhere(device: DeviceSpec) -> CardAllocator:
    """The allocator of a CUDA device that is not here, with the settings of this environment."""
    return _allocator(device.capability[0], device.context_nbytes)


def _allocator(major: int, context: int) -> CardAllocator:
    workspace = cublas_workspace(os.environ.get("CUBLAS_WORKSPACE_CONFIG"), major)
    config = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    return CardAllocator((workspace,) if workspace else (), expandable_segments(config), context)
