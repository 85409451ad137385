"""A step on fixed buffers that runs many times: as a CUDA graph where there is CUDA, else called again."""

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.errors import EngineError
from octavo.ops.capture import capture_stream, capturing


class Repeated:
    """``step`` run again at every call; its result is one buffer, overwritten by the next call.

    ``step`` reads and writes the same tensors each time and asks the device for no value. On CUDA the first call runs
    it, which compiles its kernels; the second captures it; from then on a call is one launch, whatever Python ``step``
    holds. Elsewhere every call runs it.
    """

    def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
        self._step, self._device = step, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def __call__(self) -> Tensor:
        """The result of one more run.

        Raises:
            EngineError: the step cannot be captured; the text is that of CUDA.
        """
        if self._device.type != "cuda" or self._result is None:
            self._keep(self._step())
        else:
            if self._graph is None:
                self._graph = self._captured()
            self._graph.replay()
        assert self._result is not None
        return self._result

    def _keep(self, result: Tensor) -> None:
        if self._result is None:
            self._result = result.clone()
        else:
            self._result.copy_(result)

    def _captured(self) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize(self._device)
        # The graph's pool cannot use what other pools hold in reserve.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, torch.cuda.graph_pool_handle(), capture_stream(self._device)):
                self._keep(self._step())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise EngineError(
                f"A decoding step could not be captured as a CUDA graph: {error}. Switch graphs off (`rollout.graphs: "
                "false`, `octavo chat --graphs false`, `octavo.generate(graphs=False)`)."
            ) from error
        return graph
