"""`medswav monitoring`: rules with thresholds of a site, dashboards, or pictures of these."""

from pathlib import Path
from typing import Annotated

import typer

from shards.errors import UserError


def monitoring(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Written to; made if it is not there.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="name=value", help="A threshold of docs/metrics.md; may be repeated."),
    ] = None,
    plot_from: Annotated[
        str | None, typer.Option(help="A Prometheus: draw the dashboards as PNG, for want of Grafana.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=1, help="With --plot-from: how far back.")] = 60.0,
) -> None:
    """Write rules for Prometheus with thresholds of your own, and dashboards for Grafana; or pictures.

    Example: medswav monitoring DIR --set data_wait_ratio=0.1

    Example: medswav monitoring DIR --plot-from http://127.0.0.1:9090
    """
    from orchestration.dashboard_plot import write_pictures
    from orchestration.monitoring import files, thresholds, write

    if plot_from is not None and set_:
        raise UserError(
            "--set is for the rules, and --plot-from draws what was measured: leave one of them away"
        )
    if plot_from is not None:
        for path in write_pictures(plot_from, folder, minutes):
            typer.echo(path)
        return
    for path in write(folder, files(thresholds(set_ or ()))):
        typer.echo(path)
