"""Rows one after the other, each in a process of its own, written down after every one."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from octavo.trial.step import Row

# Nothing loads and steps in less on a model that is worth measuring.
_LEAST_SECONDS = 10.0


def run_rows(
    rows: Sequence[Row],
    *,
    out: Path | None,
    budget_s: float,
    say: Callable[[str], None],
    environment: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Measure ``rows`` within ``budget_s`` seconds, and append each to the JSON list in ``out`` as it is done.

    A row that fails is a row with ``error``. Rows for which no time is left are named by ``say`` and not written, so
    that a second call with them finishes the table.
    """
    began = time.monotonic()
    found: list[dict[str, Any]] = []
    longest = _LEAST_SECONDS
    for number, row in enumerate(rows):
        left = budget_s - (time.monotonic() - began)
        if left < longest:
            say(f"{len(rows) - number} rows are left out, first {row.label}: {left:.0f} s of the budget are left")
            break
        start = time.monotonic()
        result = _in_process(row, left, environment)
        longest = max(longest, 0.8 * (time.monotonic() - start))
        found.append(result)
        if out is not None:
            _append(out, result)
        say(f"{row.label}: {_summary(result)}")
    return found


def _in_process(row: Row, seconds: float, environment: dict[str, str] | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "octavo.trial.step", json.dumps(asdict(row))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=environment)
    except subprocess.TimeoutExpired as late:
        # bytes, whatever was asked for
        printed = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout
        return _row_in(printed or "") or {"error": f"not done within {seconds:.0f} s", **asdict(row)}
    result = _row_in(done.stdout)
    if result is not None:
        return result
    last = done.stderr.strip().splitlines()[-3:]
    return {"error": f"exit code {done.returncode}: {' / '.join(last)}", **asdict(row)}


def _row_in(printed: str) -> dict[str, Any] | None:
    """The row that a process printed last: it is measured, however the process ends after it."""
    lines = printed.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _append(out: Path, result: dict[str, Any]) -> None:
    rows = json.loads(out.read_text()) if out.exists() else []
    out.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: the process may be cut off at any time.
    fresh = out.with_suffix(".part")
    fresh.write_text(json.dumps([*rows, result], indent=1) + "\n")
    fresh.replace(out)


def _summary(result: dict[str, Any]) -> str:
    if "error" in result:
        return str(result["error"])
    text = f"{result['tokens_per_s']:,.0f} tokens/s, {result['step_ms']:.0f} ms"
    if result["peak_reserved_gb"] is not None:
        text += f", peak {result['peak_allocated_gb']:.2f} GB, reserved {result['peak_reserved_gb']:.2f}"
    if result["plan_gb"] is not None:
        text += f", planned {result['plan_gb']:.2f}"
    return f"{text}; loaded in {result['load_s']:.1f} s"
