"""Which errors mean that the device has no memory left."""

from __future__ import annotations

import torch

_WORDS = (
    "can't allocate memory",  # torch's CPU allocator: posix_memalign, and its Windows and mobile forms
    "not enough memory: you tried to allocate",  # the same, in other releases
    "cannot allocate memory",  # the system's ENOMEM
    "std::bad_alloc",
    "out of memory",  # CUDA's own text, in a RuntimeError where it comes from a library
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "cusparse_status_insufficient_resources",
    "cudnn_status_internal_error_host_allocation_failed",
    "could not create a memory object",  # oneDNN
)
"""In lower case, as in the text of errors that have no type of their own."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that an allocation failed, on the CPU or on a card.

    True for `torch.OutOfMemoryError`, `MemoryError`, the text of torch's CPU allocator, and what cuBLAS and cuDNN say
    where they find no room; not for an error that only has such a one as its cause.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, (RuntimeError, OSError)):
        return False
    text = str(error).lower()
    return any(words in text for words in _WORDS)
