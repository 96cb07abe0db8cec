"""Commands that talk to a running server: generate, adapt, tasks, jobs."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli_outcome import describe_outcome
from server.cli_output import JsonFlag, fail, guarded, print_fields, print_json, print_table, shorten
from server.environment import CLIENT_KEY, CLIENT_URL

if TYPE_CHECKING:
    from mhr_client import Client, Job, JobInfo

Url = Annotated[str, typer.Option("--url", envvar=CLIENT_URL, help="The server's address")]
Key = Annotated[str | None, typer.Option("--api-key", envvar=CLIENT_KEY, help="The key, where the server wants one")]
DEFAULT_URL = "http://127.0.0.1:8000"

tasks = typer.Typer(help="Tasks of a running server.", no_args_is_help=True)
task = typer.Typer(help="One task.", no_args_is_help=True)
jobs = typer.Typer(help="Adaptation jobs of a running server.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(generate)
    app.command()(adapt)
    app.add_typer(tasks, name="tasks")
    app.add_typer(task, name="task")
    app.add_typer(jobs, name="jobs")


def _client(url: str, key: str | None) -> Client:
    from mhr_client import Client

    return Client(url, api_key=key)


# --- generate ---------------------------------------------------------------------------------------------------


@guarded
def generate(
    text: Annotated[list[str], typer.Argument(help="One input or several; - reads one from standard input")],
    task_id: Annotated[str, typer.Option("--task", help="A task, task@version, base or mu")],
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option(min=0)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    n: Annotated[int | None, typer.Option("-n", min=1, help="Answers per input")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this string; may be repeated")] = None,
    choices: Annotated[list[str] | None, typer.Option("--choice", help="Rank these answers instead; repeat it")] = None,
    raw_prompt: Annotated[bool, typer.Option(help="Send the text to the model as it is")] = False,
    stream: Annotated[bool, typer.Option(help="Print the text as it comes (one input)")] = False,
    as_json: JsonFlag = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Answer inputs with a task."""
    inputs = [sys.stdin.read() if part == "-" else part for part in text]
    parameters: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "n": n,
        "stop": stop or None,
        "choices": choices or None,
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    if stream and (as_json or len(inputs) > 1 or (n or 1) > 1):
        fail("--stream prints the text of one answer; leave out --json, -n and further inputs")
    with _client(url, key) as client:
        if stream:
            _print_stream(client, task_id, inputs[0], raw_prompt, given)
            return
        answer = client.generate(task_id, inputs, raw_prompt=raw_prompt, **given)
    if as_json:
        print_json(asdict(answer))
        return
    for output in answer.outputs:
        typer.echo(output.text)
        for score in output.scores or ():
            typer.echo(f"  {score.score:9.4f}  {score.text}", err=True)


def _print_stream(client: Client, task_id: str, text: str, raw_prompt: bool, given: dict[str, Any]) -> None:
    from mhr_client import Token

    for item in client.stream(task_id, text, raw_prompt=raw_prompt, **given):
        if isinstance(item, Token):
            typer.echo(item.text, nl=False)
    typer.echo()


# --- adapt ------------------------------------------------------------------------------------------------------


@guarded
def adapt(
    task_id: Annotated[str, typer.Option("--task", help="The task to make or to teach further")],
    examples: Annotated[Path, typer.Option(exists=True, dir_okay=False, help='JSON Lines of {"input", "output"}')],
    method: Annotated[str, typer.Option(help="mhr, mhr-z, mhr-mu, poly, poly-z, poly-mu or lora")] = "mhr",
    instruction: Annotated[str | None, typer.Option(help="What the task is, in words")] = None,
    inventory: Annotated[str | None, typer.Option(help="The served one if left out")] = None,
    validation: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Examples to validate on")
    ] = None,
    promote: Annotated[str, typer.Option(help="if_better, always or never")] = "if_better",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    hyperparameter: Annotated[
        list[str] | None, typer.Option("--set", help="A hyperparameter as name=value; may be repeated")
    ] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key returns the same job")] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the job and show its progress")] = False,
    as_json: JsonFlag = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Teach a task from examples, in the background."""
    options: dict[str, Any] = {"method": method, "promote": promote, "seed": seed}
    optional = {"instruction": instruction, "inventory": inventory, "idempotency_key": idempotency_key}
    options |= {name: value for name, value in optional.items() if value is not None}
    if hyperparameter:
        options["hyperparameters"] = dict(_assignment(text) for text in hyperparameter)
    if validation is not None:
        options["validation"] = {"examples": _read_lines(validation)}
    with _client(url, key) as client:
        job = client.adapt(task_id, _read_lines(examples), **options)
        if wait:
            _follow(job, quiet=as_json)
    if as_json:
        print_json(asdict(job.info))
    else:
        _print_job(job.info)


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        fail(f"--set {text}: write it as name=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                fail(f"{path}, line {number} is not JSON: {error}")
    return rows


def _follow(job: Job, quiet: bool) -> None:
    """Wait for the job with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        bar = progress.add_task("queued", total=None)

        def show(info: JobInfo) -> None:
            steps = info.progress.get("steps")
            loss = info.progress.get("loss")
            description = info.status if loss is None else f"{info.status}, loss {loss:.3f}"
            progress.update(bar, description=description, total=steps, completed=info.progress.get("step", 0))

        job.wait(show)


# --- tasks ------------------------------------------------------------------------------------------------------


@tasks.command("list")
@guarded
def list_tasks(
    prefix: Annotated[str | None, typer.Option(help="Only ids that begin with it")] = None,
    as_json: JsonFlag = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """All tasks."""
    with _client(url, key) as client:
        found = list(client.iter_tasks(prefix=prefix))
    if as_json:
        print_json([asdict(item) for item in found])
        return
    print_table(
        ("task", "version", "inventory", "instruction"),
        ((item.id, item.served_version, item.inventory, shorten(item.instruction)) for item in found),
    )


@tasks.command("show")
@guarded
def show_task(task_id: str, as_json: JsonFlag = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """One task and its versions."""
    with _client(url, key) as client:
        found = asdict(client.get_task(task_id))
    if as_json:
        print_json(found)
        return
    versions = found.pop("versions") or ()
    print_fields(found)
    typer.echo()
    print_table(
        ("version", "kind", "method", "inventory", "bytes", "job", "created"),
        (
            (v["number"], v["kind"], v["method"], v["inventory"], v["size_bytes"], v["job_id"], v["created_at"])
            for v in versions
        ),
    )


@tasks.command("delete")
@guarded
def delete_task(task_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Delete a task and its versions."""
    with _client(url, key) as client:
        client.delete_task(task_id)
    typer.echo(f"deleted {task_id}")


@tasks.command("promote")
@guarded
def promote_task(task_id: str, version: int, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Serve another version of a task."""
    with _client(url, key) as client:
        found = client.promote(task_id, version)
    typer.echo(f"{found.id} serves version {found.served_version}")


@task.command("export")
@guarded
def export_task(
    task_id: Annotated[str, typer.Argument(help="A task, task@version or mu")],
    out: Annotated[Path, typer.Option(help="The directory to make")],
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Write a task as a PEFT LoRA checkpoint."""
    with _client(url, key) as client:
        content = client.export_task(task_id)
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for entry in archive.getmembers():
            source = archive.extractfile(entry)
            if source is not None:
                (out / Path(entry.name).name).write_bytes(source.read())
    typer.echo(f"wrote {out}")


# --- jobs -------------------------------------------------------------------------------------------------------


@jobs.command("list")
@guarded
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs of this status")] = None,
    task_id: Annotated[str | None, typer.Option("--task", help="Only jobs of this task")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    as_json: JsonFlag = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
) -> None:
    """Jobs, newest first."""
    options: dict[str, Any] = {"status": status, "task_id": task_id}
    with _client(url, key) as client:
        found = client.list_jobs(limit=limit, **options).data
    if as_json:
        print_json([asdict(item) for item in found])
        return
    print_table(
        ("job", "task", "method", "status", "step", "version", "created", "error"),
        (
            (
                j.id,
                j.task_id,
                j.method,
                j.status,
                j.progress.get("step"),
                j.version,
                j.created_at,
                shorten(j.error or ""),
            )
            for j in found
        ),
    )


@jobs.command("show")
@guarded
def show_job(job_id: str, as_json: JsonFlag = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """One job and its events."""
    with _client(url, key) as client:
        job = client.get_job(job_id)
        events = job.events()
    if as_json:
        print_json(asdict(job.info) | {"events": [asdict(event) for event in events]})
        return
    _print_job(job.info)
    typer.echo()
    print_table(("seq", "time", "event", "data"), ((e.seq, e.created_at, e.type, json.dumps(e.data)) for e in events))


@jobs.command("wait")
@guarded
def wait_for_job(job_id: str, as_json: JsonFlag = False, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Wait for a job and show its progress."""
    with _client(url, key) as client:
        job = client.get_job(job_id)
        _follow(job, quiet=as_json)
    if as_json:
        print_json(asdict(job.info))
    else:
        _print_job(job.info)


@jobs.command("cancel")
@guarded
def cancel_job(job_id: str, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Cancel a job."""
    with _client(url, key) as client:
        info = client.cancel_job(job_id)
    typer.echo(f"{info.id} {'is cancelled' if info.status == 'cancelled' else 'will stop after its present step'}")


def _print_job(info: JobInfo) -> None:
    print_fields(asdict(info))
    if info.version is not None:
        typer.echo(f"\n{describe_outcome(info)}")
