"""``python -m octavo.ops.hopper``: compile every product for Hopper now, so that no first step waits for one.

It needs no GPU: a home folder that several machines share, or the image of a container, is filled once.
"""

from concurrent.futures import ThreadPoolExecutor
from os import cpu_count

from octavo.ops.hopper.compiler import cache_folder, machine_code, missing
from octavo.ops.hopper.engine import modes


def main() -> None:
    """Compile what is not compiled yet, with all processors."""
    if reason := missing():
        raise SystemExit(f"The products for Hopper cannot be compiled here: {reason}.")
    every = list(modes())
    with ThreadPoolExecutor(cpu_count()) as pool:
        for done, _ in enumerate(pool.map(machine_code, every), 1):
            print(f"\r{done} of {len(every)} products for Hopper compiled", end="", flush=True)
    print(f"; they are in {cache_folder()}.")


if __name__ == "__main__":
    main()
