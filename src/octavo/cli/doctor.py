"""``octavo doctor``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from octavo.doctor.report import EngineReport, Machine


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; the rest goes to stderr.")] = False,
) -> None:
    """Show the GPU, the versions and the engines, and test each engine that can run here against float64.

    Tests run side by side, each engine in processes of its own. Exit code 1 if something that auto picks here is wrong.
    """
    # Imported here: --help should not wait for torch.
    from octavo.doctor.report import examine

    console = Console(stderr=as_json)
    with console.status("looking", spinner="dots") as status:
        report = examine(status.update)
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        for line in _machine(report.machine):
            console.print(escape(line), highlight=False, soft_wrap=True)
        console.print(_engines(report.engines))
        bad = [one for one in report.engines if one.auto and not one.right]
        verdict = ", ".join(f"{one.numerics} on {one.engine}" for one in bad)
        console.print(
            "What auto picks here computes the right thing."
            if report.healthy
            else f"[red]Wrong here, though auto picks it: {verdict}. Choose engine 'reference', and report this.[/]",
            soft_wrap=True,
        )
    if not report.healthy:
        raise typer.Exit(1)


def _machine(machine: Machine) -> list[str]:
    gpu = f"{machine.device}, {machine.architecture}"
    if machine.driver or machine.cuda:
        gpu += f", {machine.memory_gb} GB, {machine.gpus} of them, driver {machine.driver}, CUDA {machine.cuda}"
    packages = ", ".join(f"{name} {number or 'not installed'}" for name, number in machine.packages.items())
    return [gpu, f"{machine.system}, Python {machine.python}, octavo {machine.octavo}", packages]


def _engines(reports: tuple[EngineReport, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("numerics", "engine", "auto", "seconds", "self-test"):
        numbers = name == "seconds"
        table.add_column(name, no_wrap=name != "self-test", overflow="fold", justify="right" if numbers else "left")
    for report in reports:
        seconds = f"{report.seconds:.1f}" if report.seconds else ""
        table.add_row(report.numerics, report.engine, "yes" if report.auto else "", seconds, escape(_found(report)))
    return table


def _found(report: EngineReport) -> str:
    if report.why_not is not None:
        return f"not run: {report.why_not}"
    if report.crash:
        return f"FAILED: {report.crash}"
    wrong = [check for check in report.checks if not check.right and check.error is not None]
    if wrong:
        return "WRONG: " + "; ".join(
            f"{check.what}, {check.layout}: error {check.error:.1e} in {check.worst}, at most {check.limit:.1e}"
            for check in wrong
        )
    if refused := [check for check in report.checks if check.error is None]:
        return f"FAILED: {refused[0].what}, {refused[0].layout}: {refused[0].problem}"
    worst = max(check.error for check in report.checks if check.error is not None)
    return f"right, {len(report.checks)} checks, largest error {worst:.1e}"
