"""Loading beside a plain sequential read of the same files: seconds, GB/s, host memory; cold and warm page cache.

    python -m benchmarks.load /tmp/octavo-glm --out benchmarks/results/load-h200.json

``read``: every file from its beginning to its end in 16 MB pieces. ``load``: ``octavo.load_model``, checks included.
``stock``: transformers' own loader with octavo's storage, as ``octavo.enabled`` has it. Each runs in a process of its
own. Cold means that the files' pages were dropped, which the kernel does for pages that are on disk and in no use.
"""

import argparse
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

PIECE = 16 << 20
GB = 1e9


def drop(files: list[Path]) -> None:
    """Ask the kernel to forget the pages of ``files``."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read(files: list[Path]) -> int:
    """Read ``files`` in order and return their bytes."""
    buffer, total = bytearray(PIECE), 0
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                total += count
    return total


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def timed(way: str, folder: str, cold: bool) -> dict[str, Any]:
    """One measurement, in this process."""
    files = sorted(Path(folder).glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    result: dict[str, Any] = {"way": way, "cold": cold, "gb": size / GB}
    if way == "read":
        if cold:
            drop(files)
        start = time.perf_counter()
        assert read(files) == size
    else:
        import torch
        from transformers import AutoModelForCausalLM

        import octavo

        if torch.cuda.is_available():
            # The context is not the load's.
            torch.zeros(1, device="cuda")
        octavo.load_model  # noqa: B018  # imports transformers, which is not the load's either
        if cold:
            drop(files)
        before, highest, done = anonymous(), 0, threading.Event()

        def sample() -> None:
            nonlocal highest
            while not done.wait(0.01):
                highest = max(highest, anonymous() - before)

        sampler = threading.Thread(target=sample)
        sampler.start()
        start = time.perf_counter()
        try:
            if way == "load":
                octavo.load_model(folder)
            else:
                with octavo.enabled():
                    device_map = {"": 0} if torch.cuda.is_available() else None
                    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device_map)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                result["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / GB
                result["device"] = torch.cuda.get_device_name()
        finally:
            done.set()
            sampler.join()
        result["host_peak_gb"] = highest / GB
    result["seconds"] = time.perf_counter() - start
    result["gb_per_s"] = size / GB / result["seconds"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ways", nargs="*", default=["read", "load", "stock"])
    parser.add_argument("--only", choices=("cold", "warm"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    sequential: dict[bool, float] = {}
    for cold in (True, False):
        if args.only == ("warm" if cold else "cold"):
            continue
        for way in args.ways:
            # A pool of multiprocessing waits for good where its process was killed.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(timed, way, str(args.folder), cold).result()
            if way == "read":
                sequential[cold] = row["gb_per_s"]
            if cold in sequential:
                row["of_sequential"] = row["gb_per_s"] / sequential[cold]
            rows.append(row)
            share = f", {row['of_sequential']:.0%} of the plain read" if "of_sequential" in row else ""
            host = f", host +{row['host_peak_gb']:.2f} GB" if "host_peak_gb" in row else ""
            host += f", GPU {row['peak_reserved_gb']:.2f} GB reserved" if "peak_reserved_gb" in row else ""
            state = "cold" if cold else "warm"
            print(f"{state} {way:6} {row['seconds']:7.2f} s {row['gb_per_s']:6.2f} GB/s{share}{host}", flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
