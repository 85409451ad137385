"""Loading beside a plain sequential read of the same files: seconds, GB/s, host memory; cold and warm page cache.

    python -m benchmarks.load /tmp/octavo-glm --out benchmarks/results/load-h200.json

``read``: every file from its beginning to its end in 16 MB pieces. ``load``: ``octavo.load_model``, checks included.
``load, read ahead``: the same while a thread reads the files into the page cache in their order, as far ahead as it
gets. Each runs in a process of its own. Cold means that the files' pages were dropped, which the kernel does for pages
that are on disk and in no use.
"""

import argparse
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def read(files: list[Path], stop: threading.Event | None = None) -> int:
    """Read ``files`` in order and return their bytes, or those until ``stop``."""
    buffer, total = bytearray(PIECE), 0
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while (stop is None or not stop.is_set()) and (count := handle.readinto(buffer)):
                total += count
    return total


@contextmanager
def reading_ahead(files: list[Path]) -> Iterator[None]:
    stop = threading.Event()
    reader = threading.Thread(target=read, args=(files, stop))
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


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
        if way == "load":
            octavo.load_model(folder)
        else:
            with reading_ahead(files):
                octavo.load_model(folder)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            result["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / GB
            result["device"] = torch.cuda.get_device_name()
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
    parser.add_argument("--ways", nargs="*", default=["read", "load", "load, read ahead"])
    parser.add_argument("--only", choices=("cold", "warm"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    sequential: dict[bool, float] = {}
    for cold in (True, False):
        if args.only == ("warm" if cold else "cold"):
            continue
        for way in args.ways:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(timed, (way, str(args.folder), cold))
            if way == "read":
                sequential[cold] = row["gb_per_s"]
            if cold in sequential:
                row["of_sequential"] = row["gb_per_s"] / sequential[cold]
            rows.append(row)
            share = f", {row['of_sequential']:.0%} of the plain read" if "of_sequential" in row else ""
            host = f", host +{row['host_peak_gb']:.2f} GB" if "host_peak_gb" in row else ""
            state = "cold" if cold else "warm"
            print(f"{state} {way:18} {row['seconds']:7.2f} s {row['gb_per_s']:6.2f} GB/s{share}{host}", flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
