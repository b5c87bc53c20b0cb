"""What an error means that another library raised."""

from __future__ import annotations


class UsageError(ValueError):
    """The command line or its config file is wrong; exit code 2."""


def is_out_of_memory(error: BaseException) -> bool:
    import torch  # not above: the command line is to answer to Ctrl-C while this loads

    # PyTorch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(
        error
    )
