"""The `tandem` command: `serve` runs a deployment in the foreground; the files named *_cli.py have the other commands.

A StartupError becomes one line on standard error and exit code 1; Ctrl-C and SIGTERM stop everything that was started.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cluster import logs
from cluster.config import Config, load, resolved
from cluster.errors import StartupError
from cluster.messages import WorkerInfo
from deploy import config_cli, fetch_cli, kv_cli, orders_cli, plan_cli, sim_cli, status_cli, top
from deploy.doctor import cli as doctor_cli
from deploy.environment import prepare
from deploy.terminal import console, fail

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(kv_cli.app, name="kv")
app.command()(sim_cli.simulate)
app.command()(plan_cli.plan)
app.command()(fetch_cli.fetch)
app.command()(status_cli.status)
for order in (orders_cli.drain, orders_cli.roles, orders_cli.scale, orders_cli.restart, orders_cli.log):
    app.command()(order)
app.command(context_settings=config_cli.SETTINGS)(config_cli.config)
app.command()(doctor_cli.doctor)
app.command()(top.top)
MAIN = os.getpid()
MODEL_HELP = "GGUF file, Hugging Face directory or hub id [default: the demo model]"


class Stop(BaseException):
    """A signal asked the process to end. No Exception: whatever code it is raised in must not swallow it."""


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings")] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on, 0 for a free one [default: 8000]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16")] = None,
    prefill: Annotated[int | None, typer.Option(help="prefill workers; 0: decode workers do both [default: 1]")] = None,
    decode: Annotated[int | None, typer.Option(help="decode workers [default: 1]")] = None,
    prefill_tp: Annotated[int | None, typer.Option(help="tensor ranks of a prefill worker [default: 1]")] = None,
    prefill_pp: Annotated[int | None, typer.Option(help="pipeline stages of a prefill worker [default: 1]")] = None,
    decode_tp: Annotated[int | None, typer.Option(help="tensor ranks of a decode worker [default: 1]")] = None,
    decode_pp: Annotated[int | None, typer.Option(help="pipeline stages of a decode worker [default: 1]")] = None,
    max_context: Annotated[int | None, typer.Option(help="tokens per request [default: the model's]")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="name in the API")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis of the block index [default: an embedded one]")] = None,
    disk: Annotated[str | None, typer.Option(help="folder where KV blocks survive a restart [default: none]")] = None,
    runner: Annotated[
        str | None, typer.Option(help="torch (CPUs), cuda (GPUs), or sim for a model without weights")
    ] = None,
    placement: Annotated[str | None, typer.Option(help="how workers are chosen [default: least_time]")] = None,
    autoscaling: Annotated[
        str | None, typer.Option(help="slo, utilization[:PART], schedule:HH:MM=N,..., fixed, module:function")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="least and most shards (GPUs): MIN..MAX [default: none more]")
    ] = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP endpoint, prefill and decode in separate worker processes."""
    given = {k: v for k, v in locals().items() if k != "config" and v is not None}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        _serve(load(config, os.environ, given))
    except (Stop, KeyboardInterrupt):
        console.print("stopped")
    except SystemError as error:
        if not isinstance(error.__cause__, Stop):  # Ray's native code makes this of one that reaches it
            raise
        console.print("stopped")
    except StartupError as error:
        fail(error.message)


def _stop(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != MAIN:
        return  # a child between fork and exec got it too, with our handler; it is stopped like its siblings
    # a second signal must not cut the clean-up short and leave processes behind
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise Stop


def _serve(config: Config) -> None:
    logs.configure()
    config = resolved(config)
    if config.host not in ("127.0.0.1", "localhost", "::1") and not config.api_keys:
        console.print(f"anybody who reaches {config.host} can use this server: set TANDEM_API_KEYS", style="yellow")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("importing", total=1.0)

        def report(what: str, fraction: float) -> None:
            progress.update(task, description=what, completed=fraction)

        prepare(config.request_timeout)  # before Ray is imported
        # torch and Ray take seconds to import: bad flags and `tandem status` should not wait for them
        from deploy.launch import check_port, deployment
        from deploy.models import resolve

        check_port(config.host, config.port)
        report("getting the model", 0.0)
        model = resolve(config.model, lambda fraction: report("converting the model (once)", fraction))
        with deployment(config, model, report) as running:
            progress.stop()
            question = {"role": "user", "content": "What is the capital of France?"}
            example = json.dumps({"messages": [question], "temperature": 0})
            console.print(
                Panel.fit(
                    f"[bold]{running.model_name}[/] at [bold]{running.url}/v1[/]   {config.dtype}, "
                    f"{', '.join(map(_shown, running.workers))}   Ctrl-C stops it",
                    title="Tandem is ready",
                )
            )
            command = f"curl {running.url}/v1/chat/completions -H 'content-type: application/json' -d '{example}'"
            console.print(command, markup=False, highlight=False, soft_wrap=True)  # whole, to be pasted
            running.watch()


def _shown(worker: WorkerInfo) -> str:
    """One line about a worker that runs."""
    shards = f", {worker.tp} x {worker.pp} shards" if len(worker.shard_pids) > 1 else ""
    return f"{worker.id} (pid {worker.pid}{shards})"


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    sections: Annotated[
        str, typer.Option(help="some of engine,serve,store,tier,shards,placement,routing,fidelity")
    ] = "engine,serve,store",
    trace: Annotated[Path | None, typer.Option(help="recorded requests, for the section routing")] = None,
    out: Annotated[Path | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """Measure this machine's limits and Tandem against them, in one run."""
    try:
        _bench(model or "", dtype, sections.split(","), trace, out)
    except StartupError as error:
        fail(error.message)


def _bench(model: str, dtype: str, sections: list[str], trace: Path | None, out: Path | None) -> None:
    config = resolved(load(None, {}, {"model": model, "dtype": dtype, "prefill": 0}))
    os.environ["OMP_NUM_THREADS"] = str(config.threads)  # before torch is imported
    from deploy.bench.run import NEED_A_MODEL, SECTIONS, run
    from deploy.models import resolve

    if unknown := set(sections) - set(SECTIONS):
        raise StartupError(f"unknown section {unknown.pop()!r}; there are {', '.join(SECTIONS)}")
    directory = resolve(config.model, lambda _: None).directory if NEED_A_MODEL & set(sections) else None
    run(directory, config, sections, trace, out, console)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
