"""`wan`: the command line of a running service.

Owns the commands, their options and the exit codes; what is on the screen is screen.py's. Imports
nothing heavy, so that `wan --help` and the shell's completion answer at once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from serve_app.client import doctor as checks
from serve_app.client import screen
from serve_app.client.generation import field_of, finished, image_reference
from serve_app.client.service import ClientError, Json, Refused, Service, VideoFailed, patiently
from serve_app.client.watch import PATIENCE_S

DEFAULT_URL = "http://127.0.0.1:8000"
INTERRUPTED = 130
EXIT_CODES = (
    "Exit codes: 0 done; 1 the video failed, cannot be had now, or doctor found something wrong;"
    " 2 the request or the command line is wrong; 3 the service does not answer; 4 the API key is"
    " refused; 5 there is no such video; 6 the queue is full; 130 interrupted."
)

app = typer.Typer(
    name="wan", help="Videos from a running Wan2.2 service.", epilog=EXIT_CODES,
    no_args_is_help=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="WAN_URL", help=f"The service; without it {DEFAULT_URL}."),
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="WAN_API_KEY", help="Its key, if it needs one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
VideoId = Annotated[str, typer.Argument(metavar="ID", show_default=False)]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("wan-serve"))
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, end."),
    ] = False,
) -> None:
    pass


@app.command(epilog=EXIT_CODES)
def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The mp4; without it ID.mp4 here.", dir_okay=False),
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", "-i", help="First frame: a file or a URL.")
    ] = None,
    last_image: Annotated[str | None, typer.Option(help="Last frame (I2V models).")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="See `wan models`.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="4n + 1.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Instead of --num-frames.")] = None,
    fps: Annotated[int | None, typer.Option(min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Without it a random one.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Of the high-noise expert; alone it sets both.")
    ] = None,
    guidance_low_noise: Annotated[float | None, typer.Option()] = None,
    shift: Annotated[float | None, typer.Option(help="Of the noise schedule.")] = None,
    boundary_ratio: Annotated[
        float | None, typer.Option(help="Where the low-noise expert takes over.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="unipc, dpm++ or euler.")] = None,
    cache: Annotated[
        float | None, typer.Option(help="Reuse steps that change less than this, as 0.05.")
    ] = None,
    priority: Annotated[int | None, typer.Option(help="Higher goes first.")] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other field of POST /v1/videos. Repeatable."),
    ] = None,
    prompt_extend: Annotated[
        bool, typer.Option("--prompt-extend", help="Let a language model write the prompt out.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Print the id and do not wait.")
    ] = False,
    patience_s: Annotated[
        float, typer.Option(help="How long to wait for a service that stops answering.")
    ] = PATIENCE_S,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a video and download it. Ctrl-C cancels it."""
    with _reporting(as_json), _service(url, api_key) as service:
        if detach and output is not None:
            raise Refused("--detach does not wait for the video", "leave --output away")
        if output is not None and not output.parent.is_dir():
            raise Refused(f"there is no folder {output.parent}", "make it first")
        fields = {
            "prompt": prompt,
            "model": model,
            "size": size,
            "num_frames": num_frames,
            "seconds": seconds,
            "fps": fps,
            "num_inference_steps": steps,
            "seed": seed,
            "negative_prompt": negative_prompt,
            "guidance_scale": guidance,
            "guidance_scale_2": guidance_low_noise,
            "flow_shift": shift,
            "boundary_ratio": boundary_ratio,
            "solver": solver,
            "cache": cache,
            "priority": priority,
            "prompt_extend": prompt_extend or None,
            "input_reference": image and image_reference(image),
            "last_image": last_image and image_reference(last_image),
        }
        given = {name: value for name, value in fields.items() if value is not None}
        video = service.create(given | dict(field_of(text) for text in field or ()))
        if detach:
            _print(video, as_json, video["id"])
            return
        output = output or Path(f"{video['id']}.mp4")
        video = finished(service, video["id"], patience_s)
        patiently(lambda: service.download(video["id"], output), patience_s=patience_s)
        _print(video | {"output": str(output)}, as_json, str(output))


@app.command(epilog=EXIT_CODES)
def jobs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="The newest so many.")] = 20,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List videos, the newest first."""
    with _reporting(as_json), _service(url, api_key) as service:
        videos = service.videos(limit)
        _print({"data": videos}, as_json, screen.videos_table(videos, now=time.time()))


@app.command("show", epilog=EXIT_CODES)
def show_video(video_id: VideoId, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False):
    """Everything about one video."""
    with _reporting(as_json), _service(url, api_key) as service:
        video = service.video(video_id)
        _print(video, as_json, screen.video_table(video))


@app.command(epilog=EXIT_CODES)
def cancel(
    video_ids: Annotated[list[str], typer.Argument(metavar="ID...", show_default=False)],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Stop videos that wait or run. Finished ones stay."""
    with _reporting(as_json), _service(url, api_key) as service:
        for video_id in video_ids:
            if (status := service.video(video_id)["status"]) in ("completed", "failed"):
                raise VideoFailed(f"{video_id} is {status}", "there is nothing to cancel")
            service.delete(video_id)
        _print(
            {"cancelled": video_ids}, as_json, "\n".join(f"{each}: cancelled" for each in video_ids)
        )


@app.command(epilog=EXIT_CODES)
def download(
    video_id: VideoId,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="Without it ID.mp4 here.")
    ] = None,
    variant: Annotated[str, typer.Option(help="video, thumbnail, ...")] = "video",
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the file of a finished video."""
    with _reporting(as_json), _service(url, api_key) as service:
        suffix = ".mp4" if variant == "video" else f"-{variant}.webp"
        output = output or Path(f"{video_id}{suffix}")
        size_bytes = service.download(video_id, output, variant=variant)
        found = {"id": video_id, "output": str(output), "size_bytes": size_bytes}
        _print(found, as_json, str(output))


@app.command(epilog=EXIT_CODES)
def models(url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """What the service serves, with the defaults."""
    with _reporting(as_json), _service(url, api_key) as service:
        found = service.models()
        _print(found, as_json, screen.models_table(found["data"]))


@app.command(epilog=EXIT_CODES)
def doctor(
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="WAN_DATA_DIR", help="Where videos are kept on this machine."),
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Look for what is wrong with the service and with this machine."""
    from serve_app.config import DEFAULT_DATA_DIR  # pydantic takes a while to load

    folder = Path(data_dir or DEFAULT_DATA_DIR).expanduser().absolute()
    console, found = Console(highlight=False), []
    with _reporting(as_json), _service(url, api_key) as service:
        for check in checks.examine(service, has_api_key=bool(api_key), data_dir=folder):
            found.append(check)
            if not as_json:
                console.print(screen.check_line(check), soft_wrap=True)
        failed = any(check.status == "fail" for check in found)
        if as_json:
            _print({"ok": not failed, "checks": [vars(check) for check in found]}, True, "")
        if failed:
            raise typer.Exit(1)


def _service(url: str | None, api_key: str | None) -> Service:
    return Service(url or DEFAULT_URL, api_key=api_key)


@contextlib.contextmanager
def _reporting(as_json: bool) -> Iterator[None]:
    """A ClientError becomes its line and its exit code; in JSON it is the one document."""
    try:
        yield
    except ClientError as error:
        if as_json:
            code = {"message": str(error), "exit_code": error.exit_code}
            typer.echo(json.dumps({"error": code}))
        else:
            Console(stderr=True, highlight=False).print(
                Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True
            )
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _print(found: Json, as_json: bool, shown: Any) -> None:
    """`found` for machines, `shown` for people."""
    if as_json:
        typer.echo(json.dumps(found))
    elif isinstance(shown, str):
        typer.echo(shown)
    else:
        # A table that goes into a pipe keeps its lines whole.
        Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(shown)


if __name__ == "__main__":
    app()
