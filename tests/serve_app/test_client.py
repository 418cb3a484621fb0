"""`wan`, the command line, against the HTTP service on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import uvicorn
from http_service import frames_of, http_service, on_loopback, picture, resolved, working
from typer.testing import CliRunner

from serve_app.client import doctor
from serve_app.client.commands import app
from serve_app.client.service import Service
from serve_app.client.watch import watch

pytestmark = pytest.mark.anyio

SMALL = ["--size", "64x64", "--num-frames", "5", "--steps", "4"]


@pytest.fixture
async def url(service):
    async with on_loopback(service.app) as url:
        yield url


async def wan(*arguments: str, env: dict[str, str] | None = None):
    """The command's result: `exit_code`, `stdout`, `stderr`."""
    env = {"WAN_API_KEY": None, "WAN_URL": None} | (env or {})
    return await asyncio.to_thread(CliRunner().invoke, app, arguments, env=env)


async def wait_for(condition, timeout_s: float = 20.0):
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.02)
    return found


# --- generate --------------------------------------------------------------------------------


async def test_generate_follows_a_video_and_saves_it(service, url, tmp_path):
    image = tmp_path / "first.png"
    image.write_bytes(picture(64, 64))
    output = tmp_path / "out.mp4"
    async with working(service.store, service.artifacts, step_s=0.3):
        done = await wan(
            "generate", "a cat", *SMALL, "-m", "wan-tiny-i2v", "-i", str(image), "--seed", "7",
            "--guidance", "2", "--negative-prompt", "dogs", "--field", 'user="me"',
            "-o", str(output), "--url", url,
        )  # fmt: skip
    assert (done.exit_code, done.stdout) == (0, f"{output}\n"), done.stderr
    assert frames_of(output.read_bytes())[:3] == (5, 64, 64)
    *on_the_way, end = done.stderr.splitlines()
    assert on_the_way and end.endswith("completed, 100 %")
    (job,) = await service.store.list()
    assert (job.prompt, job.negative_prompt, job.user, job.num_steps) == ("a cat", "dogs", "me", 4)
    assert (job.params["seed"], job.params["guidance_low_noise"]) == (7, 2)
    assert await service.artifacts.get(job.input_image) == image.read_bytes()
    assert [path.name for path in tmp_path.glob(".out*")] == []


async def test_generate_survives_a_restart_of_the_service_while_it_waits(service, tmp_path):
    """Serve's proxy is there before the application: it says 404, which is not the video's end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = tmp_path / "out.mp4"
    arguments = ("generate", "a cat", *SMALL, "--url", f"http://127.0.0.1:{port}", "-o")
    async with serving(service.app, port):
        waiting = asyncio.create_task(wan(*arguments, str(output)))
        await wait_for(service.store.list)
        await asyncio.sleep(0.3)
    await asyncio.sleep(0.3)
    async with serving(not_there_yet, port):
        await asyncio.sleep(0.6)
    async with working(service.store, service.artifacts), serving(service.app, port):
        done = await waiting
    assert (done.exit_code, output.exists()) == (0, True), done.stderr
    assert "waiting for it" in done.stderr


@contextlib.asynccontextmanager
async def serving(asgi_app, port: int):
    """Ends as a killed process does: with connections open."""
    config = uvicorn.Config(asgi_app, port=port, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await task


async def not_there_yet(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b"Path '/v1/videos' not found."})


async def test_a_proxy_that_keeps_the_events_costs_only_polling(service):
    async def no_streams(scope, receive, send) -> None:
        if scope["path"].endswith("/events"):
            await not_there_yet(scope, receive, send)
        else:
            await service.app(scope, receive, send)

    async with on_loopback(no_streams) as url, working(service.store, service.artifacts):
        with Service(url) as client:
            video = await asyncio.to_thread(client.create, {"prompt": "a cat", "size": "64x64"})
            seen = await asyncio.to_thread(lambda: list(watch(client, video["id"])))
    assert seen[-1].ended and seen[-1].progress == 100


async def test_ctrl_c_cancels_the_video_and_exits_130(service, url):
    command = [sys.executable, "-m", "serve_app.client.commands", "generate", "a cat", "--url", url]
    client = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    async with working(service.store, service.artifacts, step_s=0.05):
        await wait_for(service.store.list)
        (job,) = await service.store.list()
        await wait_for(client.stderr.readline)  # it is following now
        client.send_signal(signal.SIGINT)
        _, told = await client.communicate()
        assert client.returncode == 130
        assert f"{job.id}: cancelled" in told.decode()

        async def is_cancelled():
            return (await service.store.get(job.id)).status == "cancelled"

        await wait_for(is_cancelled)


async def test_a_detached_video_is_left_alone(service, url):
    done = await wan("generate", "a cat", "--detach", env={"WAN_URL": url})
    assert done.exit_code == 0
    assert (await service.store.get(done.stdout.strip())).status == "queued"


# --- the other commands ----------------------------------------------------------------------


async def test_every_command_has_a_table_for_people_and_json_for_machines(service, url, tmp_path):
    async with working(service.store, service.artifacts):
        made = await wan("generate", "[b]a cat[/b]", *SMALL, "-o", str(tmp_path / "v.mp4"),
                         "--json", "--url", url)  # fmt: skip
    video_id = json.loads(made.stdout)["id"]
    waiting = (await wan("generate", "a dog", "--detach", "--url", url)).stdout.strip()

    async def both(*arguments: str):
        shown = await wan(*arguments, "--url", url)
        machine = await wan(*arguments, "--json", "--url", url)
        assert (shown.exit_code, machine.exit_code) == (0, 0), shown.output
        return shown.stdout, json.loads(machine.stdout)

    shown, found = await both("jobs")
    assert [video["id"] for video in found["data"]] == [waiting, video_id]
    assert "completed" in shown and "[b]a cat[/b]" in shown  # a prompt is no markup
    shown, found = await both("show", video_id)
    assert (found["status"], found["num_frames"]) == ("completed", 5)
    assert "completed" in shown
    shown, found = await both("models")
    assert found["data"][0]["id"] in shown
    thumbnail = tmp_path / "t.webp"
    shown, found = await both("download", video_id, "--variant", "thumbnail", "-o", str(thumbnail))
    assert found["size_bytes"] == thumbnail.stat().st_size > 0
    assert (await wan("cancel", waiting, "--url", url)).stdout == f"{waiting}: cancelled\n"
    assert await service.store.get(waiting) is None


async def test_cancel_never_deletes_a_finished_video(service, url, tmp_path):
    async with working(service.store, service.artifacts):
        made = await wan("generate", "a cat", *SMALL, "-o", str(tmp_path / "v.mp4"), "--json",
                         "--url", url)  # fmt: skip
    video_id = json.loads(made.stdout)["id"]
    refused = await wan("cancel", video_id, "--url", url)
    assert (refused.exit_code, refused.stderr.count("nothing to cancel")) == (1, 1)
    assert (await service.store.get(video_id)).status == "completed"


# --- exit codes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["generate", "a cat", "--size", "63x64"], 2, "63"),
        (["generate", "a cat", "-m", "sora"], 2, "no model 'sora'"),
        (["generate", "a cat", "--field", "colour=red"], 2, "unknown field 'colour'"),
        (["generate", "a cat", "--field", "seed=NaN"], 2, "cannot be written as JSON"),
        (["generate", "half \udcff"], 2, "cannot be written as JSON"),
        (["generate", "a cat", "-i", "nowhere.png"], 2, "cannot read nowhere.png"),
        (["generate", "a cat", "-o", "nowhere/x.mp4"], 2, "there is no folder nowhere"),
        (["show", "video_" + "0" * 24], 5, "no video"),
        (["show", "../models"], 5, "not the id of a video"),
        (["jobs", "--url", "http://127.0.0.1:9"], 3, "start one with `make serve`"),
        (["jobs", "--url", "127.0.0.1:9"], 3, "no service at"),
    ],
)
async def test_a_refusal_is_one_line_and_an_exit_code(url, arguments, exit_code, words):
    done = await wan(*arguments, env={"WAN_URL": url})
    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert words in done.stderr and done.stderr.count("\n") == 1
    machine = await wan(*arguments, "--json", env={"WAN_URL": url})
    assert json.loads(machine.stdout)["error"]["exit_code"] == exit_code


async def test_a_failed_video_is_exit_code_1_with_its_reason(service, url):
    waiting = asyncio.create_task(wan("generate", "a cat", "--url", url))
    job = await wait_for(lambda: service.store.claim("w", lease_s=30, max_attempts=1))
    await service.store.fail(job.id, job.attempt, code="c", message="a rank died")
    done = await waiting
    assert done.exit_code == 1
    assert done.stderr.endswith("a rank died\n")


async def test_a_full_queue_and_a_wrong_key_have_their_own_exit_codes(tmp_path):
    settings = resolved(api_keys="right", jobs={"max_queued_jobs": 1})
    async with http_service(tmp_path, settings) as service, on_loopback(service.app) as url:
        env = {"WAN_URL": url, "WAN_API_KEY": "right"}
        assert (await wan("generate", "a cat", "-d", env=env)).exit_code == 0
        full = await wan("generate", "a cat", "-d", env=env)
        assert full.exit_code == 6 and "try again in" in full.stderr
        refused = await wan("jobs", env=env | {"WAN_API_KEY": "wrong"})
        assert refused.exit_code == 4 and "set WAN_API_KEY" in refused.stderr


# --- doctor ----------------------------------------------------------------------------------


async def test_doctor_names_what_is_wrong_with_the_service(tmp_path):
    async with http_service(tmp_path, resolved(api_keys="right")) as service:
        service.stages_run["VAE"] = False
        async with on_loopback(service.app) as url:
            assert await found_by_doctor(url, api_key="right", tmp_path=tmp_path) == {
                "service": ("ok", f"{url} answers"),
                "stages": ("warn", "waiting for VAE"),
                "API key": ("ok", "accepted; it serves wan-tiny, wan-tiny-i2v, wan-tiny-ti2v"),
            }
            found = await found_by_doctor(url, api_key="wrong", tmp_path=tmp_path)
            assert found["API key"][0] == "fail"
    found = await found_by_doctor("http://127.0.0.1:9", api_key=None, tmp_path=tmp_path)
    assert found["service"][0] == "fail"


async def found_by_doctor(url: str, *, api_key: str | None, tmp_path):
    """Its checks of the service, without those of the machine."""

    def examine():
        with Service(url, api_key=api_key) as service:
            found = doctor.examine(service, has_api_key=bool(api_key), data_dir=tmp_path)
            of_service = itertools.takewhile(lambda check: check.name != "python", found)
            return {check.name: (check.status, check.found) for check in of_service}

    return await asyncio.to_thread(examine)


async def test_doctor_looks_at_this_machine(url, tmp_path):
    done = await wan("doctor", "--json", "--url", url, "--data-dir", str(tmp_path / "not" / "yet"))
    assert done.exit_code == 0
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {"python", "torch", "GPU", "kernels", "ray", "disk", "codec"} <= set(found)
    assert found["codec"]["found"].startswith("libx264 of ffmpeg")
    assert all(check["advice"] for check in found.values() if check["status"] != "ok")


@pytest.mark.parametrize(
    ("gpus", "hopper", "compiles", "installed", "status", "said"),
    [
        ([], False, False, None, "ok", "none needed"),
        (["H200"], True, True, None, "ok", "our own"),
        (["H200"], True, False, "4.0", "warn", "cuda-bindings for CUDA 13.0"),
        (["A100"], False, True, "4.0", "ok", "flash-attn-4 4.0"),
        (["A100"], False, True, None, "warn", "flash-attn is not installed"),
    ],
)
async def test_doctor_knows_what_each_gpu_is_quick_with(
    monkeypatch, gpus, hopper, compiles, installed, status, said
):
    monkeypatch.setattr(doctor, "_version", lambda name: installed)
    told = {"gpus": gpus, "hopper": hopper, "compiles": compiles, "built_for": "13.0"}
    check = doctor._kernels(told)
    assert check.status == status and said in check.found


async def test_doctor_warns_of_little_space_and_fails_without_any(monkeypatch, tmp_path):
    for free_gib, status in [(30, "ok"), (10, "warn"), (0.5, "fail")]:
        usage = type("Usage", (), {"free": free_gib * 2**30})
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert doctor._disk(tmp_path).status == status


# --- the command itself ----------------------------------------------------------------------


async def test_the_command_starts_without_anything_heavy():
    heavy = "{'torch', 'ray', 'pydantic', 'fastapi', 'sqlalchemy', 'numpy', 'av', 'transformers'}"
    probe = f"import sys, serve_app.client.commands; print({heavy} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert answer.stdout == "set()\n", answer.stderr


async def test_every_command_and_option_in_the_readme_exists():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    commands = re.findall(r"^wan (\w+)(.*)$", readme, re.M)
    assert {"generate", "jobs", "doctor"} <= {name for name, _ in commands}
    for name, rest in commands:
        options = set(re.findall(r"--[a-z-]+", rest.split("  #")[0]))
        shown = await wan(name, "--help", env={"COLUMNS": "300"})
        assert shown.exit_code == 0, name
        assert [option for option in options if option not in shown.stdout] == []


async def test_the_help_documents_the_exit_codes_and_completion_exists():
    shown = await wan("--help", env={"COLUMNS": "300"})
    assert "6 the queue is full" in " ".join(shown.stdout.split())
    assert "--install-completion" in shown.stdout
