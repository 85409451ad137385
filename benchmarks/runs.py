"""A whole run of ``octavo sft`` at full size: its loss falls, it can be killed and resumed, and the seed repeats it.

    python -m benchmarks.runs glm --out benchmarks/results/runs-h200.json

Real text, a small set of it, which the adapter learns by heart: the weights are drawn. Three runs of one configuration:
unbroken; killed (SIGKILL) once it is past ``--kill-at`` and started again; unbroken again, which says how far two runs
differ by themselves. The checkpoint is made in ``--folder`` unless it is there.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import octavo
from benchmarks.checkpoints import KINDS, write
from octavo.bench.run import commit
from octavo.train.metrics import read_metrics

DEFINITIONS = Path(octavo.__path__[0]) / "demo" / "data" / "definitions-train.jsonl"
ENDS = 10
"""Steps whose mean loss stands for the beginning and the end."""


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "octavo", "sft", str(config)], stdout=file, stderr=file)


def losses(folder: Path) -> dict[int, float]:
    """By step, as far as the run has come; NaN where the file says null."""
    lines = read_metrics(folder / "metrics.jsonl")
    return {line["step"]: float("nan") if line["loss"] is None else line["loss"] for line in lines if "loss" in line}


def finish(config: Path, folder: Path, log: Path) -> dict[int, float]:
    """Run it to its end.

    Raises: SystemExit with the end of the log, where it fails.
    """
    if code := start(config, log).wait():
        sys.exit(f"octavo sft ended with {code}:\n{log.read_text(errors='replace')[-3000:]}")
    return losses(folder)


def kill_past(step: int, config: Path, folder: Path, log: Path) -> int:
    """Start it, and kill it once ``step`` is done and a checkpoint is there; the last step that it had written."""
    process = start(config, log)
    while process.poll() is None:
        done = max(losses(folder), default=0)
        if done >= step and any(folder.rglob("trainer_state.json")):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return done
        time.sleep(0.2)
    sys.exit(f"octavo sft ended before step {step}:\n{log.read_text(errors='replace')[-3000:]}")


def apart(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference of a loss, relative; infinite where one run has a step that the other has not."""
    if one.keys() != other.keys():
        return float("inf")
    return max(abs(one[step] - other[step]) / abs(one[step]) for step in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=KINDS)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or will be; /tmp/octavo-MODEL")
    parser.add_argument("--work", type=Path, help="where the runs go; /tmp/octavo-runs-MODEL")
    parser.add_argument("--out", type=Path, help="add the row to this file")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--kill-at", type=int, default=50)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--once", action="store_true", help="only the first two runs")
    parser.add_argument("--set", nargs="*", default=[], help="more of the configuration, as train.graphs=true")
    parser.add_argument("--tiny", action="store_true", help="a checkpoint for a CPU")
    args = parser.parse_args()
    folder = args.folder or Path(f"/tmp/octavo-{args.model}")
    work = args.work or Path(f"/tmp/octavo-runs-{args.model}")
    work.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        write(args.model, folder, tiny=args.tiny)
    data = work / "data.jsonl"
    data.write_text("".join(DEFINITIONS.read_text().splitlines(keepends=True)[: args.examples]))
    configs = {}
    for name in ("whole", "killed", "again"):
        tree: dict[str, Any] = {
            "model": {"path": str(folder)},
            "lora": {"r": 16, "expert_rank": 16, "targets": ["attention", "experts"]},
            "data": {"train": str(data), "max_length": args.seq, "packing": True, "loss": "all"},
            "train": {
                "steps": args.steps, "batch_size": 1, "lr": 5e-4, "save_every": max(1, args.kill_at // 2),
                "keep_checkpoints": 1, "seed": 0,
            },
            "out": str(work / name),
        }  # fmt: skip
        for change in args.set:
            key, value = change.split("=", 1)
            section, field = key.split(".")
            tree[section][field] = yaml.safe_load(value)
        configs[name] = work / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump(tree))
    began = time.monotonic()
    whole = finish(configs["whole"], work / "whole", work / "whole.log")
    print(f"whole: {len(whole)} steps in {time.monotonic() - began:.0f} s", flush=True)
    killed_at = kill_past(args.kill_at, configs["killed"], work / "killed", work / "killed.log")
    resumed = finish(configs["killed"], work / "killed", work / "killed.log")
    print(f"killed at step {killed_at}, resumed: losses {apart(whole, resumed):.1e} apart", flush=True)
    again = None if args.once else finish(configs["again"], work / "again", work / "again.log")
    if again is not None:
        print(f"again: losses {apart(whole, again):.1e} apart", flush=True)
    values = [whole[step] for step in sorted(whole)]
    row = {
        "model": args.model, "seq": args.seq, "steps": args.steps, "set": args.set, "losses": values,
        "first_loss": statistics.mean(values[:ENDS]), "last_loss": statistics.mean(values[-ENDS:]),
        "finite": all(value == value for value in values), "killed_at": killed_at,
        "resumed_apart": apart(whole, resumed), "again_apart": None if again is None else apart(whole, again),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__,
        "commit": commit(),
    }  # fmt: skip
    print(json.dumps({key: value for key, value in row.items() if key != "losses"}, indent=1))
    if args.out:
        rows = json.loads(args.out.read_text()) if args.out.exists() else []
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
