"""Compile `product.cu` with NVRTC for one set of compile-time modes, keep the result on disk, load it.

NVRTC and its Python binding (``cuda.bindings``) come with torch's CUDA wheels; no CUDA toolkit is needed. Compiling
takes seconds and needs no GPU; results are kept in ``~/.cache/octavo``.
"""

import hashlib
import importlib.util
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from octavo.errors import EngineError

ARCHITECTURE = "sm_90a"
SHARED_BYTES = 232448
"""Shared memory that a block may have on Hopper."""

EVERY_LANE = False
"""Set before the first product, in a process that a tool watches for races; see `product.cu`. Slower."""

MOST_BLOCKS: int | None = None
"""Of a launch, for tools that want several tiles of a small product in each; else one for a multiprocessor."""

STORE, SWIGLU, GRADIENT = 0, 1, 2
NONE, COLUMN, TABLE, SLAB = 0, 1, 2, 3


@dataclass(frozen=True)
class Mode:
    """The compile-time modes of the kernel; see `product.cu`."""

    wide: bool
    flip: bool
    scale: int
    stage: int
    tokens: int
    bank: bool = False
    outer: bool = False
    peaks: bool = False

    @property
    def registers(self) -> tuple[int, int]:
        """Of a producer's and of a consumer's thread."""
        if self.consumers > 2:
            return 32, 160
        return (40, 232) if self.scale == SLAB or self.tokens > 128 else (56, 224)

    @property
    def tokens_left(self) -> bool:
        """Whether tokens are the rows of a multiplication; see `product.cu`."""
        return self.scale == SLAB and not self.flip

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply; see `product.cu`."""
        return 3 if self.tokens_left and self.tokens == 192 else 2

    @property
    def threads(self) -> int:
        """Of a block."""
        return 128 * (1 + self.consumers)

    @property
    def columns(self) -> int:
        """Of a multiplication; see `product.cu`."""
        return 128 if self.tokens_left else self.tokens


def missing() -> str | None:
    """Why kernels cannot be compiled in this environment, or ``None``."""
    try:
        found = importlib.util.find_spec("cuda.bindings.nvrtc")
    except ModuleNotFoundError:
        found = None
    return None if found else "the package cuda-bindings, which comes with torch's CUDA builds, is not installed"


def _wgmma(columns: int) -> str:
    """The inline assembly of wgmma, as the struct ``MMA``."""
    count = columns // 2
    sums = "{" + ", ".join(f"%{i}" for i in range(count)) + "}"
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))

    def function(name: str, kind: str, left: int, ends: str) -> str:
        names = [f"a{i}" for i in range(left)]
        one = left == 1
        operand = f"%{count}" if one else "{" + ", ".join(f"%{count + i}" for i in range(left)) + "}"
        lines = (
            f"static __device__ __forceinline__ void {name}(float (&d)[{count}], "
            + ", ".join(f"{'u64' if one else 'u32'} {n}" for n in names) + ", u64 b, int keep) {",
            f'asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + left + 1}, 0;\\n'
            f'wgmma.mma_async.sync.aligned.m64n{columns}{kind} {sums}, {operand}, %{count + left}, p, {ends};\\n}}"',
            f": {outputs} : " + ", ".join(f'"{"l" if one else "r"}"({n})' for n in names) + ', "l"(b), "r"(keep));',
            "}",
        )  # fmt: skip
        return "\n".join(lines) + "\n"

    return (
        "struct MMA {\n"
        + function("wide", "k16.f32.bf16.bf16", 4, "1, 1, 0")
        + function("wide_ss", "k16.f32.bf16.bf16", 1, "1, 1, 0, 0")
        + function("wide_ss_turned", "k16.f32.bf16.bf16", 1, "1, 1, 1, 0")
        + function("narrow_rs", "k32.f32.e4m3.e4m3", 4, "1, 1")
        + function("narrow_ss", "k32.f32.e4m3.e4m3", 1, "1, 1")
        + "};"
    )


@cache
def _template() -> str:
    folder = files("octavo.ops.hopper")
    return "".join(folder.joinpath(name).read_text() for name in ("instructions.cuh", "product.cu"))


def source(mode: Mode) -> str:
    """The kernel's CUDA C++ for ``mode``; macros come as compiler options."""
    producer, consumer = mode.registers
    text = _template().replace("@WGMMA@", _wgmma(mode.columns))
    return text.replace("@PRODUCER_REGISTERS@", str(producer)).replace("@CONSUMER_REGISTERS@", str(consumer))


def macros(mode: Mode) -> list[str]:
    """The modes as the compiler's definitions."""
    values = {
        "WIDE": mode.wide,
        "BANK": mode.bank,
        "OUTER": mode.outer,
        "PEAKS": mode.peaks,
        "FLIP": mode.flip,
        "SCALE": mode.scale,
        "STAGE": mode.stage,
        "BN": mode.tokens,
        "COLUMNS": mode.columns,
        "CONSUMERS": mode.consumers,
        "EVERY_LANE": EVERY_LANE,
    }
    return [f"-D{name}={int(value)}" for name, value in values.items()]


def _options(mode: Mode) -> list[str]:
    return [
        f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", "-default-device", "--ptxas-options=-v", *macros(mode),
    ]  # fmt: skip


def compile_mode(mode: Mode) -> tuple[bytes, str]:
    """(machine code, compiler's log). Raises :class:`EngineError` with the log when it does not compile."""
    from cuda.bindings import nvrtc

    def check(result: tuple[Any, ...]) -> Any:
        if int(result[0]):
            raise EngineError(f"NVRTC failed with {result[0]}; torch's CUDA build and cuda-bindings may not match.")
        return result[1] if len(result) > 1 else None

    program = check(nvrtc.nvrtcCreateProgram(source(mode).encode(), b"product.cu", 0, [], []))
    options = [option.encode() for option in _options(mode)]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
    check(nvrtc.nvrtcGetProgramLog(program, log))
    if int(status[0]):
        raise EngineError(f"the Hopper kernel does not compile ({status[0]}): {log.decode(errors='replace')}")
    code = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
    check(nvrtc.nvrtcGetCUBIN(program, code))
    check(nvrtc.nvrtcDestroyProgram(program))
    return code, log.decode(errors="replace")


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path.home() / ".cache" / "octavo"


def machine_code(mode: Mode) -> bytes:
    """Compiled code of ``mode``, from disk where it was compiled before."""
    key = hashlib.sha256("\n".join([source(mode), *_options(mode)]).encode()).hexdigest()[:32]
    path = cache_folder() / f"product-{key}.cubin"
    if path.exists():
        return path.read_bytes()
    code, _ = compile_mode(mode)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)
    except OSError:
        # a home that cannot be written costs compiling again, nothing else
        pass
    return code


@cache
def _kernel(mode: Mode, device: int, entry: bytes) -> Any:
    from cuda.bindings import driver

    def check(result: tuple[Any, ...]) -> Any:
        if int(result[0]):
            raise EngineError(f"the CUDA driver refused the Hopper kernel: {result[0]}.")
        return result[1] if len(result) > 1 else None

    library = check(driver.cuLibraryLoadData(machine_code(mode), [], [], 0, [], [], 0))
    kernel = check(driver.cuLibraryGetKernel(library, entry))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(driver.cuKernelSetAttribute(attribute, SHARED_BYTES, kernel, check(driver.cuDeviceGet(device))))
    return driver.CUfunction(int(kernel))


def launch(mode: Mode, device: torch.device, most: int, arguments: int) -> None:
    """Launch on the current stream of ``device``, at most ``most`` blocks, with the address of an array of argument
    pointers.
    """
    from cuda.bindings import driver

    blocks = min(most, MOST_BLOCKS or torch.cuda.get_device_properties(device).multi_processor_count)
    stream = torch.cuda.current_stream(device).cuda_stream
    function = _kernel(mode, device.index or 0, b"product")
    (status,) = driver.cuLaunchKernel(
        function, blocks, 1, 1, mode.threads, 1, 1, SHARED_BYTES, driver.CUstream(stream), arguments, 0
    )
    if int(status):
        raise EngineError(f"the CUDA driver could not launch the Hopper kernel: {status}.")
