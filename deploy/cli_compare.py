"""`pefbox compare`: the DMA designs side by side."""

from __future__ import annotations

from pathlib import Path

import click

from protocol.errors import UserError


@click.command("compare")
@click.option("--designs", default="", help="Only these, with commas between; all when left out.")
@click.option("--workload", "workloads", default="", help="Of read, write, randread, net, boot; all when left out.")
@click.option("--normal", is_flag=True, help="Normal VMs only.")
@click.option("--secure", is_flag=True, help="Secure VMs only.")
@click.option("--cost", "costs", multiple=True, metavar="NAME=NS", help="A cost of the model, in nanoseconds.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where the report goes.")
@click.option("--about", default="", help="A line about the machine, for the report.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, too.")
def compare(
    designs: str,
    workloads: str,
    normal: bool,
    secure: bool,
    costs: tuple[str, ...],
    out: Path,
    about: str,
    as_json: bool,
) -> None:
    """Run every DMA design on the same work, and write a report: DIR/report.html and DIR/report.json.

    For each design a normal and a secure VM count what they do, in a run that repeats exactly, and are timed in
    another; an old guest and old firmware are tried on its devices. All of it takes some minutes.

    The exit status is 1 when a claim of the discussion is not borne out by the counts.
    """
    import msgspec
    import trio
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from deploy.compare.claims import Borne
    from deploy.compare.costs import read_costs
    from deploy.compare.plan import Trial, Workload, plan
    from deploy.compare.report import as_table, claim_lines, write_report
    from deploy.compare.run import run_comparison
    from deploy.tables import console
    from shared.dma_designs import DmaDesign

    chosen = tuple(DmaDesign(name) for name in parse_names(designs, DmaDesign, "design")) or tuple(DmaDesign)
    work = tuple(Workload(name) for name in parse_names(workloads, Workload, "workload")) or tuple(Workload)
    trials = plan(chosen, check_kinds(normal, secure), work)
    model = read_costs(costs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=len(trials))

        def on_trial(trial: Trial) -> None:
            progress.update(task, description=trial.title, completed=trials.index(trial))

        report = trio.run(run_comparison, trials, work, model, {}, on_trial)
    files = write_report(report, out, about)
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        console().print(as_table(report))
        for line in claim_lines(report):
            click.echo(line)
    for file in files:
        click.echo(f"written: {file}", err=True)
    raise SystemExit(1 if any(claim.verdict is Borne.NOT for claim in report.claims) else 0)


def check_kinds(normal: bool, secure: bool) -> tuple[bool, ...]:
    """The kinds of VM that a user asked for; both when nothing was said."""
    kinds = tuple(kind for kind, asked in ((False, normal), (True, secure)) if asked)
    return kinds or (False, True)


def parse_names(names: str, allowed: type, what: str) -> tuple[str, ...]:
    """The names of a list with commas; raises UserError for one that does not exist."""
    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    known = [str(value) for value in allowed]  # type: ignore[attr-defined]
    for name in chosen:
        if name not in known:
            raise UserError(f'no {what} "{name}"; there is: {", ".join(known)}')
    return chosen
