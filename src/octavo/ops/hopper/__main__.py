"""``python -m octavo.ops.hopper``: compile every product for Hopper now, so that no first step waits for one.

It needs no GPU: a home folder that several machines share, or the image of a container, is filled once.
"""

from concurrent.futures import ThreadPoolExecutor
from os import cpu_count

from rich.console import Console
from rich.progress import track

from octavo.ops.hopper.compiler import cache_folder, machine_code, missing
from octavo.ops.hopper.engine import modes


def main() -> None:
    """Compile what is not compiled yet, with all processors."""
    console = Console()
    if reason := missing():
        console.print(f"The products for Hopper cannot be compiled here: {reason}.")
        raise SystemExit(1)
    every = list(modes())
    with ThreadPoolExecutor(cpu_count()) as pool:
        for _ in track(pool.map(machine_code, every), "Compiling", len(every), console=console):
            pass
    console.print(f"{len(every)} products for Hopper are in {cache_folder()}.")


if __name__ == "__main__":
    main()
