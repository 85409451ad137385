"""The end of a command that torchrun or accelerate started several times."""

import torch


def leave_group() -> None:
    """Leave the processes that trained together, if there are any: threads of the group's own would still run when
    Python ends, and may end it by a signal after all is done and written.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
