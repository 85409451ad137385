"""The end of a command that torchrun or accelerate started several times."""

import atexit
import os
import sys
import threading

import torch


def leave(code: int) -> None:
    """End this process with the exit ``code``, if it is one of several that trained together.

    Threads of the group's own still run when Python takes itself apart, and may end it by a signal after all is done
    and written, before the group is destroyed and after. So Python's own threads are waited for, what is registered
    for its end runs, what was printed is written, and nothing after that.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
