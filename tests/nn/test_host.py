"""How much host memory there is: the system's, or a container's."""

from pathlib import Path

import pytest
import torch

from octavo.errors import EngineError
from octavo.nn import host
from octavo.nn.host import available_bytes

MEMINFO = "MemTotal:       2000000 kB\nMemFree:          10000 kB\nMemAvailable:   1000000 kB\n"
NEW = {"memory.max": "512000000", "memory.current": "500000000", "memory.stat": "anon 7\ninactive_file 90000000\n"
       "active_file 10000000\n"}  # fmt: skip
OLD = {"memory/memory.limit_in_bytes": "512000000", "memory/memory.usage_in_bytes": "500000000",
       "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 90000000\ntotal_active_file 10000000\n"}  # fmt: skip


@pytest.mark.parametrize(
    ("group", "want"),
    [
        ({}, 1_024_000_000),
        (NEW, 112_000_000),
        (OLD, 112_000_000),
        (NEW | {"memory.max": "max"}, 1_024_000_000),
        (NEW | {"memory.max": "5120000000"}, 1_024_000_000),
        # a limit of the old kind that is none
        (OLD | {"memory/memory.limit_in_bytes": str(2**63 - 4096)}, 1_024_000_000),
    ],
    ids=["no container", "a container", "an old one", "without a limit", "with a large one", "with none, old"],
)
def test_a_container_has_what_its_limit_leaves(tmp_path: Path, group: dict[str, str], want: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    for name, text in group.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert available_bytes(tmp_path) == want


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    assert available_bytes() is None or available_bytes() > 0


def test_what_torch_keeps_pinned_is_given_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [1_000]
    monkeypatch.setattr(host, "available_bytes", lambda: left[0])
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: left.__setitem__(0, 9_000), raising=False)
    words = {"asked": "this", "contents": "that", "otherwise": "leave it"}
    with pytest.raises(EngineError, match="this needs"):
        host.HostMemory(torch.device("cpu"), [8_000], **words)
    host.HostMemory(torch.device("cuda", 0), [8_000], **words)
    with pytest.raises(EngineError, match="this needs"):
        host.HostMemory(torch.device("cuda", 0), [10_000], **words)
