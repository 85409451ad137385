"""``octavo doctor``: what it finds on this machine, and what it says of an engine that is wrong or dies."""

import json
import sys
import threading
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

from octavo.cli.doctor import _found
from octavo.cli.main import app
from octavo.doctor import report
from octavo.doctor.report import EngineReport, Report, machine, self_test
from octavo.doctor.selftest import Check

CPU = torch.device("cpu")
RIGHT = Check("experts", "channel", 1e-3, "y", 1e-2)


@pytest.mark.slow
def test_this_machine_is_right() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["healthy"]
    assert found["machine"]["packages"]["torch"] == torch.__version__
    picked = {(one["numerics"], one["engine"]) for one in found["engines"] if one["auto"]}
    assert {numerics for numerics, _ in picked} == {"exact", "fp8_grad", "fp8"}
    for one in found["engines"]:
        assert one["right"]
        assert one["why_not"] or len(one["checks"]) == 6


def test_a_self_test_compares_each_kind_and_layout() -> None:
    checks, crash = self_test(CPU, "dequant", "exact")
    assert crash == ""
    assert {(check.what, check.layout) for check in checks} == {
        (what, layout) for what in ("experts", "linear") for layout in ("channel", "tensor", "block 128x128")
    }
    assert all(check.right and 0 < check.error < check.limit for check in checks)


def test_an_engine_that_is_refused_in_its_process_is_no_success() -> None:
    """``fused`` has no kernels on the CPU: every check says so, none passes."""
    checks, _ = self_test(CPU, "fused", "exact")
    assert len(checks) == 6
    assert all(not check.right and "need a GPU" in check.problem for check in checks)


def test_a_process_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    checks, _ = self_test(CPU, "no-such-engine", "exact")
    assert not any(check.right for check in checks)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert self_test(CPU, "dequant", "exact") == ((), "its process ended with 1: no message")


@pytest.mark.parametrize(
    ("changed", "healthy", "says"),
    [
        ({}, True, "right, 1 checks, largest error 1.0e-03"),
        ({"checks": (replace(RIGHT, error=0.5),)}, False, "WRONG: experts, channel: error 5.0e-01 in y"),
        ({"checks": (replace(RIGHT, error=float("inf")),)}, False, "WRONG"),
        ({"checks": (replace(RIGHT, error=None, problem="no"),)}, False, "FAILED: experts, channel: no"),
        ({"crash": "it died"}, False, "FAILED: it died"),
        ({"auto": False, "crash": "it died"}, True, "FAILED: it died"),
        ({"why_not": "no GPU", "checks": ()}, True, "not run: no GPU"),
    ],
)
def test_verdicts(monkeypatch: pytest.MonkeyPatch, changed: dict, healthy: bool, says: str) -> None:
    """Only what auto picks decides the exit code."""
    one = replace(EngineReport("dequant", "exact", True, None, (RIGHT,)), **changed)
    whole = Report(machine(CPU), (one,))
    assert whole.healthy == healthy
    assert says in _found(one)
    monkeypatch.setattr(report, "examine", lambda progress: whole)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == (0 if healthy else 1)
    assert ("Wrong here" in result.stdout) != healthy
    assert json.loads(json.dumps(whole.as_json()))["machine"] == asdict(whole.machine)


def test_engines_that_compile_are_split_where_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each layout of scales, first, where all of them can run at once; else one for each engine."""
    gpu = torch.device("cuda")
    reports = [EngineReport(name, "exact", False, None) for name in ("reference", "dequant", "fused")]
    monkeypatch.setattr(report, "_workers", lambda device: 16)
    tests = report._split(reports, gpu)
    assert [(test.engine, test.layouts) for test in tests] == [
        *((name, (kind,)) for name in ("dequant", "fused") for kind in ("channel", "tensor", "block")),
        ("reference", ("channel", "tensor", "block")),
    ]
    monkeypatch.setattr(report, "_workers", lambda device: 4)
    assert [test.engine for test in report._split(reports, gpu)] == ["dequant", "fused", "reference"]


def test_processes_run_side_by_side_and_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test waits until all have begun, which none would survive one after another; one of three crashes."""
    both = threading.Barrier(3, timeout=20)

    def fake(device, engine, numerics, layouts, *, processes):  # type: ignore[no-untyped-def]
        both.wait()
        [kind] = layouts
        name = {"block": "block 128x128"}.get(kind, kind)
        checks = tuple(replace(RIGHT, what=what, layout=name) for what in ("experts", "linear"))
        return checks, "it died" if kind == "tensor" else ""

    monkeypatch.setattr(report, "self_test", fake)
    monkeypatch.setattr(report, "_workers", lambda device: 3)
    tests = [report._Test("fused", "exact", (kind,)) for kind in ("block", "tensor", "channel")]
    told: list[str] = []
    found = [one for _, one in report._run(tests, CPU, told.append)]
    whole = report._joined(EngineReport("fused", "exact", True, None), found)
    names = ("channel", "tensor", "block 128x128")
    assert [(check.what, check.layout) for check in whole.checks] == [
        (what, name) for what in ("experts", "linear") for name in names
    ]
    assert whole.crash == "it died"
    assert not whole.right
    assert told[-1] == "3 of 3 tests done"
