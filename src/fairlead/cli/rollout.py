"""`fairlead rollout`: from a new version to all traffic, and back."""

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from click.decorators import FC
from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fairlead.cli.admin import Asks, Local, ask, place_options, show_json, target
from fairlead.core.config import read_yaml
from fairlead.core.errors import ConfigError, FairleadError
from fairlead.core.rollout import RolloutPolicy

ENDED = ("complete", "aborted")
EXIT_CODES = {"promoted": 0, "complete": 0, "aborted": 1, "paused": 3}
BAR = 40
PHASES = {
    "validating": "cyan",
    "loading": "cyan",
    "progressing": "green",
    "paused": "yellow",
    "promoted": "bold green",
    "complete": "bold green",
    "aborted": "bold red",
}
VERDICTS = {"worse": "bold red", "holds": "green", "unknown": "dim"}

reason_option = click.option("--reason", default="", help="Why, for the audit log.")


@click.group()
def rollout() -> None:
    """Try new versions on part of the traffic; promote them, or go back."""


def _starting(command: FC) -> FC:
    """What `start`, `shadow` and `experiment` share."""
    for option in (
        click.option("--watch", is_flag=True, help="Stay, and show how it goes."),
        reason_option,
        click.option(
            "--policy", help="A name of control.policies, standard, quick or direct; or a YAML file.  [default: what control.models says]"
        ),
        click.argument("candidates", nargs=-1, required=True, metavar="MODEL@VERSION..."),
        place_options,
    ):
        command = option(command)
    return command


@rollout.command()
@_starting
def start(asks: Asks, candidates: tuple[str, ...], policy: str | None, reason: str, watch: bool, as_json: bool) -> None:
    """Validate a version, then give it traffic in steps; promoted at the end, taken back where it is worse.

    Several models that belong together are named together, and change sides together.
    """
    _start(asks, candidates, "canary", policy, reason, watch, as_json)


@rollout.command()
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), help="Of the champion's requests that are copied.  [default: 0.1]")
@_starting
def shadow(
    asks: Asks, candidates: tuple[str, ...], policy: str | None, reason: str, watch: bool, share: float | None, as_json: bool
) -> None:
    """Copy a share of the requests to a version and compare the answers. Nobody gets its answers."""
    _start(asks, candidates, "shadow", policy, reason, watch, as_json, share=share)


@rollout.command()
@click.option("--share", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.5, show_default=True)
@click.option("--metric", "metrics", multiple=True, help="E.g. feedback:conversion, latency_p50. Repeatable.  [default: the policy's]")
@_starting
def experiment(
    asks: Asks,
    candidates: tuple[str, ...],
    policy: str | None,
    reason: str,
    watch: bool,
    share: float,
    metrics: tuple[str, ...],
    as_json: bool,
) -> None:
    """Champion against challenger with a fixed share, until you say `promote` or `abort`."""
    more: dict[str, Any] = {"metrics": [{"name": name} for name in metrics]} if metrics else {}
    _start(asks, candidates, "experiment", policy, reason, watch, as_json, share=share, **more)


def _start(
    asks: Asks, candidates: tuple[str, ...], kind: str, policy: str | None, reason: str, watching: bool, as_json: bool, **more: Any
) -> None:
    body: dict[str, Any] = {"candidates": candidates, "kind": kind, "reason": reason, **more}
    if policy is not None:
        body["policy"] = _policy(policy)
    told = ask(asks, "POST", "/admin/rollouts", {name: value for name, value in body.items() if value is not None})
    if watching:
        _watch(asks, told["id"], as_json, 1.0, leave=False)
        return
    if as_json:
        show_json(told)
        return
    click.echo(f"{told['id']} {told['phase']}: {_candidates(told)}")
    if isinstance(asks, Local):
        click.echo("a server that shares this store takes it from here: `fairlead rollout watch`", err=True)


def _policy(text: str) -> Any:
    """A name, or the policy in a file. Raises ConfigError."""
    if not text.endswith((".yaml", ".yml")):
        return text
    path = Path(text)
    try:
        return read_yaml(path.read_text(encoding="utf-8"), RolloutPolicy, text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


@rollout.command("list")
@click.option("--model")
@click.option("--running", is_flag=True, help="Only those that have not ended.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@place_options
def list_(asks: Asks, model: str | None, running: bool, limit: int, as_json: bool) -> None:
    """The newest rollouts."""
    found = ask(asks, "GET", target("/admin/rollouts", model=model, running="true" if running else None, limit=limit))
    if as_json:
        show_json(found)
        return
    table = Table("rollout", "kind", "candidates", "phase", "share", "began", "reason")
    for each in found["rollouts"]:
        style = PHASES[each["phase"]]
        share = f"{each['share']:.0%}" if each["share"] else f"shadow {each['shadow']:.0%}" if each["shadow"] else ""
        began = datetime.fromtimestamp(each["created"], UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(each["id"], each["kind"], _candidates(each), f"[{style}]{each['phase']}[/]", share, began, Text(each["reason"]))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@rollout.command()
@click.argument("rollout")
@place_options
def show(asks: Asks, rollout: str, as_json: bool) -> None:
    """One rollout: by its id, or a model's latest."""
    told = ask(asks, "GET", target("/admin/rollouts/{}", rollout))
    if as_json:
        show_json(told)
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(picture(told))


@rollout.command()
@click.argument("rollout")
@click.option("--every", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between looks.")
@click.option("--exit", "leave", is_flag=True, help="Leave as soon as it is promoted (0), aborted (1) or paused (3): for scripts.")
@place_options
def watch(asks: Asks, rollout: str, every: float, leave: bool, as_json: bool) -> None:
    """Live: traffic, both sides' metrics, the tests, what is left. With --json a line at each look.

    Leaves with 0 once it is complete, with 1 where it was aborted.
    """
    _watch(asks, rollout, as_json, every, leave=leave)


def _watch(asks: Asks, rollout: str, as_json: bool, every: float, *, leave: bool) -> None:
    told = ask(asks, "GET", target("/admin/rollouts/{}", rollout))
    id, over = told["id"], (*ENDED, *(("promoted", "paused") if leave else ()))
    # Where nobody looks at a terminal: a line at each change.
    live = None if as_json or not sys.stdout.isatty() else Live(picture(told), auto_refresh=False, screen=False)
    said = ""
    failures = 0
    try:
        if live is not None:
            live.start()
        while True:
            if live is not None:
                live.update(picture(told), refresh=True)
            elif as_json:
                show_json(told)
            elif (line := _line(told)) != said:
                click.echo(line)
                said = line
            if told["phase"] in over:
                break
            time.sleep(every)
            try:
                told = ask(asks, "GET", target("/admin/rollouts/{}", id))
                failures = 0
            except FairleadError:
                failures += 1
                if failures > 30:  # a server that is started again is back by then
                    raise
    finally:
        if live is not None:
            live.stop()
    sys.exit(EXIT_CODES[told["phase"]])


def _line(told: dict[str, Any]) -> str:
    step = f" step {told['step']}/{told['steps']}" if told["step"] else ""
    share = f" {told['share']:.0%}" if told["share"] else f" shadow {told['shadow']:.0%}" if told["shadow"] else ""
    reason = f": {told['reason']}" if told["reason"] else ""
    return f"{_candidates(told)} {told['phase']}{step}{share}{reason}"


@rollout.command()
@click.argument("rollout")
@place_options
def report(asks: Asks, rollout: str, as_json: bool) -> None:
    """What it found, with intervals that hold whenever you look; of a shadow the worst disagreements."""
    told = ask(asks, "GET", target("/admin/rollouts/{}/report", rollout))
    if as_json:
        show_json(told)
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(picture(told["rollout"]))
    for model, found in told["shadow"].items():
        console.print(_shadow(model, found))


def _commanding(name: str, help: str) -> None:
    @rollout.command(name, help=help)
    @click.argument("rollout")
    @reason_option
    @place_options
    def command(asks: Asks, rollout: str, reason: str, as_json: bool) -> None:
        told = ask(asks, "POST", target(f"/admin/rollouts/{{}}/{name}", rollout), {"reason": reason})
        if as_json:
            show_json(told)
        else:
            click.echo(_line(told))


_commanding("pause", "Take no further step; the shares stay, and so do the breakers.")
_commanding("resume", "Go on; of a step that holds, with the next one.")
_commanding("promote", "Everything to the candidate, now.")
_commanding("abort", "Everything to the champion, now.")
_commanding("rollback", "The champion before is back at once, as long as it is kept.")


@rollout.command()
@place_options
def deployments(asks: Asks, as_json: bool) -> None:
    """What is wanted of each model, and how it stands on each server."""
    found = ask(asks, "GET", "/admin/deployments")
    if as_json:
        show_json(found)
        return
    if found["store_error"]:
        click.echo(f"control cannot reach the store: {found['store_error']}. The traffic goes on as it was.", err=True)
    if not found["deployments"]:
        click.echo("no registered model is deployed: `fairlead rollout start MODEL@VERSION` begins", err=True)
        return
    table = Table("model", "champion", "candidate", "kept", "servers", "because")
    for each in found["deployments"]:
        wanted = each["wanted"]
        share = wanted.get("share") or wanted.get("shadow")
        candidate = f"{wanted['candidate']} ({share:.0%})" if wanted.get("candidate") and share else str(wanted.get("candidate", ""))
        states = [f"@{number} {state['state']}" for versions in each["servers"].values() for number, state in versions.items()]
        counted = ", ".join(f"{state} on {states.count(state)}" for state in dict.fromkeys(states))
        kept = ", ".join(map(str, wanted.get("keep", ())))
        table.add_row(each["model"], str(wanted.get("champion", "")), candidate, kept, counted, Text(each["reason"]))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@rollout.command()
@click.argument("model")
@place_options
def undeploy(asks: Asks, model: str, as_json: bool) -> None:
    """No version of a model serves any more."""
    told = ask(asks, "DELETE", target("/admin/deployments/{}", model))
    if as_json:
        show_json(told)
    else:
        click.echo(f"{model} is not deployed any more")


# Pictures


def picture(told: dict[str, Any]) -> RenderableType:
    """One rollout as people see it."""
    style = PHASES[told["phase"]]
    head = Text.assemble((_candidates(told), "bold"), "  ", (told["phase"], style), ("  " + told["kind"] + " " + told["id"], "dim"))
    parts: list[RenderableType] = [head]
    if told["reason"]:
        parts.append(Text(told["reason"], style="yellow" if told["phase"] != "aborted" else "red"))
    parts += [_traffic(member, told["share"], told["shadow"]) for member in told["members"]]
    if told["step"]:
        parts.append(_progress(told))
    parts += [_metrics(member) for member in told["members"] if member["metrics"] and told["kind"] != "shadow"]
    parts += [_pairs(member["pairs"]) for member in told["members"] if "pairs" in member]
    if told["requests"] and told["kind"] != "shadow":
        parts.append(
            Text(
                f"the candidate answered {told['candidate_requests']:,} of {told['requests']:,} requests ({told['exposure']:.2%})",
                style="dim",
            )
        )
    return Group(*parts)


def _traffic(member: dict[str, Any], share: float, shadow: float) -> RenderableType:
    rows = Table.grid(padding=(0, 1))
    rows.add_column(min_width=24)
    model, champion, candidate = member["model"], member["champion"], member["candidate"]
    if champion:
        rows.add_row(f"{model}@{champion} champion", _bar(1.0 - share, BAR, "blue"), f"{1 - share:.1%}")
    label = f"{shadow:.1%} copied" if shadow else f"{share:.1%}"
    color = "magenta" if shadow else "green"
    rows.add_row(f"{model}@{candidate} candidate", _bar(shadow or share, BAR, color), label)
    return rows


def _progress(told: dict[str, Any]) -> RenderableType:
    answers = min((member["step_answers"] for member in told["members"]), default=0)
    need, seconds = told["least_answers"], told["least_seconds"]
    done = min(answers / need if need else 1.0, told["step_seconds"] / seconds if seconds else 1.0, 1.0)
    what = f"step {told['step']} of {told['steps']}"
    left = "waits for `promote` or `resume`" if told["hold"] else _eta(told)
    numbers = f"{answers:,}/{need:,} answers, {told['step_seconds']:.0f}/{seconds:.0f} s"
    rows = Table.grid(padding=(0, 1))
    rows.add_column(min_width=24)
    rows.add_row(what, _bar(done, BAR, "cyan"), f"{done:.0%}", Text(numbers, style="dim"), left)
    return rows


def _eta(told: dict[str, Any]) -> str:
    seconds = told["eta_seconds"]
    if seconds is None:
        return "no end in sight: too few requests" if told["phase"] == "progressing" else ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    span = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{span} left"


def _metrics(member: dict[str, Any]) -> RenderableType:
    table = Table(box=SIMPLE_HEAD)
    for name in (member["model"], "champion", "candidate", "difference", "evidence"):
        table.add_column(name)
    table.add_column(no_wrap=True, min_width=len("unknown"))
    for metric in member["metrics"]:
        name, evidence = metric["name"], max(0.0, min(metric["evidence"], 1.0))
        table.add_row(
            name,
            _interval(name, metric["champion"]),
            _interval(name, metric["candidate"]),
            _interval(name, metric["difference"], signed=True),
            _bar(evidence, BAR // 4, "red" if evidence > 0.5 else "yellow"),
            Text(metric["verdict"], style=VERDICTS[metric["verdict"]]),
        )
    return table


def _pairs(pairs: dict[str, Any]) -> RenderableType:
    agreement = pairs["agreement"]
    if agreement["value"] is None:
        return Text("no answers were compared yet", style="dim")
    return Text(
        f"{agreement['value']:.2%} of the answers agree ({agreement['low']:.2%} .. {agreement['high']:.2%}), {pairs['failed']:,} failed"
    )


def _bar(part: float, width: int, color: str) -> Bar:
    return Bar(1.0, 0.0, part, width=width, color=color, bgcolor="grey23")


def _interval(name: str, interval: dict[str, Any], *, signed: bool = False) -> Text:
    if interval["value"] is None:
        return Text("-")
    text = Text(number(name, interval["value"], signed))
    if interval["low"] is not None and interval["high"] is not None:
        text.append(f"\n{number(name, interval['low'], signed)} .. {number(name, interval['high'], signed)}", style="dim")
    return text


def number(name: str, value: float, signed: bool = False) -> str:
    """A value of a metric, in its unit."""
    sign = "+" if signed else ""
    if name.endswith("_rate"):
        return f"{value:{sign}.2%}"
    if name.startswith("feedback:"):
        return f"{value:{sign}.4g}"
    return f"{value * 1000:{sign}.3g} ms"


DECISIONS = {"agree": "bold green", "disagree": "bold red", "not enough": "yellow"}


def _shadow(model: str, found: dict[str, Any]) -> RenderableType:
    head = Text.assemble(
        (f"{model}@{found['candidate']} beside {model}@{found['champion']}: ", "bold"), (found["decision"], DECISIONS[found["decision"]])
    )
    agreement = found["agreement"]
    pairs = f"{found['agree']:,} of {found['pairs']:,} answers agree"
    if agreement["low"] is not None:
        pairs += f", between {agreement['low']:.2%} and {agreement['high']:.2%} of all; {agreement['least']:.2%} are asked"
    parts: list[RenderableType] = [head, Text(pairs)]
    if found["failed"] or found["untold"]:
        parts.append(Text(f"{found['failed']:,} failed, of {found['untold']:,} nothing can be told", style="yellow"))
    outputs = Table("output", "", box=SIMPLE_HEAD)
    for name, told in {**found["outputs"], "seconds": found["seconds"], "errors": found["errors"], **found["labelled"]}.items():
        if told:
            outputs.add_row(name, Text(_flat(told)))
    parts.append(outputs)
    if found["worst"]:
        worst = Table("distance", "what differs", "asked", "champion", "candidate", box=SIMPLE_HEAD, title="the worst disagreements")
        for each in found["worst"]:
            worst.add_row(f"{each['distance']:.4g}", *(Text(each[key]) for key in ("note", "asked", "champion", "candidate")))
        parts.append(worst)
    return Group(*parts)


def _flat(told: Any) -> str:
    match told:
        case dict():
            return ", ".join(f"{name} {_flat(each)}" for name, each in told.items() if each not in (None, {}, []))
        case list():
            return " / ".join(_flat(each) for each in told)
        case float():
            return f"{told:.4g}"
    return str(told)


def _candidates(told: dict[str, Any]) -> str:
    return ", ".join(f"{member['model']}@{member['candidate']}" for member in told["members"])
