"""The whole comparison: every trial one after the other, then the report."""

from __future__ import annotations

from collections.abc import Callable

from deploy.compare.claims import judge
from deploy.compare.costs import Costs
from deploy.compare.measure import Outcome, run_trial
from deploy.compare.plan import Trial, Workload
from deploy.compare.report import Report
from deploy.compare.results import compile_results


async def run_comparison(
    trials: list[Trial],
    workloads: tuple[Workload, ...],
    costs: Costs,
    options: dict[str, int | bool],
    on_trial: Callable[[Trial], None],
) -> Report:
    """Run `trials`, telling `on_trial` of each before it starts; raises UserError when a cluster does not start."""
    outcomes: list[tuple[Trial, Outcome]] = []
    for trial in trials:
        on_trial(trial)
        outcomes.append((trial, await run_trial(trial, options)))
    comparison = compile_results(outcomes, workloads, costs)
    return Report(comparison, judge(comparison))
