"""The web page in headless Chromium: a whole job on the real service, and every other state."""

import contextlib
import io
import json
import re
import shlex
import socketserver
import threading

import httpx
import pytest
from browser import chromium
from http_service import in_a_thread, resolved
from PIL import Image

pytestmark = pytest.mark.timeout(600)  # the first starts the service
PROMPT = 'a red circle <img src=x onerror="document.title=1"> & a "square"'
FIRST_FRAME, LAST_FRAME = re.compile("^First frame"), re.compile("^Last frame")
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser):
    """A page at a URL. What its console complains about is an error, but for answers that fail."""
    with contextlib.ExitStack() as stack:
        complaints = []

        def opened(url, *, routes=(), **context):
            context = browser.new_context(accept_downloads=True, **context)
            stack.callback(context.close)
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            page = context.new_page()
            page.set_default_timeout(WAIT_MS)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda message: complaints.append(message.text) if
                    message.type in ("error", "warning")
                    and "Failed to load resource" not in message.text else None)  # fmt: skip
            for pattern, handler in routes:
                page.route(pattern, handler)
            page.goto(url)
            return page

        yield opened
        assert complaints == []


def fill_small(page, prompt, *, steps, num_frames=9, model=None):
    if model is not None:
        page.get_by_label("Model", exact=True).select_option(model)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Size", exact=True).fill("64x64")
    page.get_by_label("Frames", exact=True).fill(str(num_frames))
    page.get_by_label("Steps", exact=True).fill(str(steps))


def card(page, video_id):
    return page.locator(f'[data-id="{video_id}"]')


def newest(page, *, other_than=()):
    """The id of the first card, once it is another than these."""
    not_those = "".join(f':not([data-id="{each}"])' for each in other_than)
    first = page.locator(f"#cards > li:first-child{not_those}")
    first.wait_for()
    return first.get_attribute("data-id")


def ended(page, video_id):
    """Its card, when the video is completed: a live stream, not a reload, says so."""
    done = card(page, video_id).locator('[data-status="completed"]')
    done.wait_for()
    return done


def derived(page, prompt):
    """The id of the completed video that the form, filled from another one, made of this prompt."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Make video").click()
    page.get_by_role("heading", name=prompt).wait_for()
    video_id = newest(page)
    ended(page, video_id)
    return video_id


def plays(player):
    """Whether a <video> has gone on: the seconds played move."""
    return player.evaluate(
        """video => new Promise(resolve => {
             video.addEventListener("error", () => resolve(false));
             const look = () => video.currentTime > 0 ? resolve(true) : setTimeout(look, 20);
             look();
           })"""
    )


def test_a_whole_job_from_the_prompt_to_remix_and_deletion(service, open_page):
    page = open_page(service.url)
    page.locator('#service[data-state="ready"]').wait_for()
    before = [each["id"] for each in httpx.get(f"{service.url}/v1/videos").json()["data"]]
    fill_small(page, PROMPT, steps=6, model="t2v")
    page.keyboard.press("Control+Enter")
    video_id = newest(page, other_than=before)

    done = ended(page, video_id)
    assert done.get_by_role("heading").inner_text() == PROMPT
    assert page.title() == "Wan videos"

    done.get_by_role("button", name="Play").click()
    assert plays(done.locator("video"))
    with page.expect_download() as download:
        done.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename.startswith(video_id)
    assert download.value.path().read_bytes() == service.content(video_id)

    done.get_by_role("button", name="Copy as curl").click()
    sent = curl_request(page.evaluate("navigator.clipboard.readText()"))
    video = service.get(video_id)
    assert (sent["prompt"], sent["seed"]) == (PROMPT, video["seed"])  # 63 bits, all of them
    again = httpx.post(f"{service.url}/v1/videos", json=sent).json()
    assert service.wait(again["id"])["status"] == "completed"
    assert service.content(again["id"]) == service.content(video_id)
    httpx.delete(f"{service.url}/v1/videos/{again['id']}").raise_for_status()

    done.get_by_role("button", name="Branch").click()
    assert page.get_by_label("Seed", exact=True).input_value() == str(video["seed"])
    assert page.get_by_label("Steps", exact=True).is_disabled()
    branch = derived(page, "a green circle on this page")
    assert service.get(branch)["branch_from"] == video_id

    done.get_by_role("button", name="Remix").click()
    page.get_by_text("Same image and settings with another prompt").wait_for()
    remix = derived(page, "a teal square on this page")
    assert service.get(remix)["remixed_from_video_id"] == video_id
    assert service.get(remix)["num_inference_steps"] == 6

    card(page, remix).get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete the video").click()
    card(page, remix).wait_for(state="detached")
    assert httpx.get(f"{service.url}/v1/videos/{remix}").status_code == 404


def curl_request(command):
    """The JSON body of a curl command, as a shell would read it."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "curl"
    assert words[1].endswith("/v1/videos")
    return json.loads(words[words.index("-d") + 1])


def test_what_is_cleared_in_a_branch_is_not_its_sources(service, open_page):
    words = {"cinematography": {"style": "anime"}, "negative_prompt": "rain", "prompt_extend": True}
    source = service.submit("a fox", model="t2v", num_inference_steps=6, **words)
    assert service.wait(source)["cinematography"] == words["cinematography"]
    page = open_page(service.url)
    card(page, source).get_by_role("button", name="Branch").click()
    assert page.get_by_label("Negative prompt").input_value() == "rain"
    page.get_by_label("Negative prompt").fill("")
    page.get_by_text("Cinematography").click()
    page.get_by_label("Style").select_option("Any")
    page.get_by_label("Extend the prompt").uncheck()
    assert page.get_by_label("Seed", exact=True).get_attribute("placeholder") == "the original's"
    branch = derived(page, "a fox with nothing else said")
    card(page, branch).get_by_role("button", name="Copy as curl").click()
    sent = curl_request(page.evaluate("navigator.clipboard.readText()"))
    again = httpx.post(f"{service.url}/v1/videos", json=sent).raise_for_status().json()
    defaults = {each["id"]: each for each in httpx.get(f"{service.url}/v1/models").json()["data"]}
    for video in (service.get(branch), again):
        assert video["branch_from"] == source
        assert video["cinematography"] is None
        assert video["negative_prompt"] == defaults["t2v"]["negative_prompt"]
        assert not video["prompt_extend"]


def test_what_the_form_could_not_offer_stays_the_sources_in_a_branch(service, open_page):
    source = service.submit("a hen", model="t2v", num_inference_steps=6)
    service.wait(source)
    no_words = ("**/v1/cinematography", lambda route: route.abort())
    page = open_page(service.url, routes=[no_words])
    card(page, source).get_by_role("button", name="Branch").click()
    page.get_by_role("button", name="Copy as curl").first.click()
    sent = curl_request(page.evaluate("navigator.clipboard.readText()"))
    assert sent["branch_from"] == source
    assert "cinematography" not in sent


def test_a_prompt_is_written_out_and_shown_when_that_is_chosen(service, open_page):
    page = open_page(service.url)
    fill_small(page, "a cat, written out", steps=2, model="t2v")
    page.get_by_label("Extend the prompt").check()
    page.get_by_role("button", name="Make video").click()
    page.get_by_role("heading", name="a cat, written out").wait_for()
    video_id = newest(page)
    done = ended(page, video_id)
    video = service.get(video_id)
    assert video["prompt_extend"] and video["revised_prompt"] is not None
    done.get_by_text("Details").click()
    facts = " ".join(done.locator("dl").inner_text().split())
    assert " ".join(video["revised_prompt"].split()) in facts


def test_an_image_is_animated_and_a_running_video_is_followed_and_cancelled(
    service, open_page, tmp_path
):
    picture = tmp_path / "first.png"
    Image.new("RGB", (64, 64), "orange").save(picture)
    page = open_page(service.url)
    fill_small(page, "it waves", steps=4, model="i2v")
    page.get_by_role("button", name="Make video").click()
    page.get_by_text("This model animates an image").wait_for()
    page.get_by_label(FIRST_FRAME).set_input_files(picture)
    assert page.get_by_role("img", name="first.png").evaluate("image => image.decode()") is None
    page.get_by_label(LAST_FRAME).wait_for()
    page.get_by_role("button", name="Make video").click()
    page.get_by_role("heading", name="it waves").first.wait_for()
    ended(page, newest(page))

    page.get_by_role("button", name="Clear").click()
    # Seconds for each expert to be seen at work: events come every half second.
    fill_small(page, "a long one", steps=100, num_frames=33, model="t2v")
    assert page.get_by_label(FIRST_FRAME).is_hidden()
    page.get_by_label("Size", exact=True).fill("128x128")
    page.get_by_role("checkbox", name="Preview").check()
    page.get_by_role("button", name="Make video").click()
    page.get_by_role("heading", name="a long one").first.wait_for()
    video_id = newest(page)
    card(page, video_id).get_by_text("Layout and motion · step").wait_for()
    card(page, video_id).get_by_text("Detail · step").wait_for()
    card(page, video_id).get_by_alt_text("Preview of the unfinished video").wait_for()
    card(page, video_id).get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Let it run").click()
    assert httpx.get(f"{service.url}/v1/videos/{video_id}").status_code == 200
    card(page, video_id).get_by_role("button", name="Cancel").press("Enter")
    page.get_by_role("button", name="Cancel the video").press("Enter")
    card(page, video_id).wait_for(state="detached")
    assert httpx.get(f"{service.url}/v1/videos/{video_id}").status_code == 404


def test_what_the_service_offers_is_what_the_form_offers(service, open_page):
    models = {model["id"]: model for model in httpx.get(f"{service.url}/v1/models").json()["data"]}
    page = open_page(service.url)
    page.get_by_label("Model", exact=True).select_option("ti2v")
    for label, name in (
        ("Size", "size"),
        ("Frames", "num_frames"),
        ("Steps", "num_inference_steps"),
    ):
        shown = page.get_by_label(label, exact=True).get_attribute("placeholder")
        assert shown == str(models["ti2v"][name])
    assert page.get_by_role("checkbox", name="Preview").count() == 0  # one expert: no boundary
    num_extend = page.get_by_role("checkbox", name="Extend the prompt").count()
    assert num_extend == models["ti2v"]["extends_prompts"]
    assert page.get_by_label(FIRST_FRAME).is_visible()
    assert page.get_by_label(LAST_FRAME).is_hidden()
    page.get_by_text("Cinematography").click()
    page.get_by_label("Time of day").select_option("dusk")
    page.get_by_label("Prompt", exact=True).fill("a harbour")
    page.get_by_role("button", name="Copy as curl").first.click()
    sent = curl_request(page.evaluate("navigator.clipboard.readText()"))
    assert sent == {
        "prompt": "a harbour",
        "model": "ti2v",
        "cinematography": {"time_of_day": "dusk"},
    }


def test_with_api_keys_the_page_asks_for_one_and_then_does_everything(open_page, tmp_path):
    with in_a_thread(tmp_path, resolved(api_keys="key-one"), step_s=0.05) as url:
        page = open_page(url)
        page.get_by_label("Key", exact=True).fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        page.get_by_text("That key was not accepted").wait_for()
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("This service needs an API key.").wait_for()
        page.get_by_role("button", name="Enter a key").click()
        page.get_by_label("Key", exact=True).fill("key-one")
        page.keyboard.press("Enter")
        page.get_by_text("No videos yet").wait_for()
        page.get_by_label("Prompt", exact=True).fill("a cat")
        page.get_by_label("Steps", exact=True).fill("40")
        page.get_by_role("button", name="Make video").click()
        page.get_by_text("high_noise_expert").wait_for()  # the stand-in's name for its stage
        done = ended(page, newest(page))
        done.locator('.poster[src^="blob:"]').wait_for()
        done.get_by_role("button", name="Play").click()
        assert plays(done.locator("video"))
        assert done.locator("video").get_attribute("src").startswith("blob:")
        with page.expect_download() as download:
            done.get_by_role("link", name="Download").click()
        assert download.value.path().stat().st_size > 500
        done.get_by_role("button", name="Copy as curl").click()
        command = page.evaluate("navigator.clipboard.readText()")
        assert "$WAN_API_KEY" in command and "key-one" not in command
        page.reload()  # the key outlives the reload, in this tab
        page.get_by_role("heading", name="a cat").wait_for()
        assert page.evaluate("localStorage.length") == 0


def test_a_curl_command_says_the_zeros_of_its_video(open_page, tmp_path):
    models = {"wan-tiny": {"checkpoint": "x", "defaults": {"cache": 0.05}}}
    zeros = {"guidance_scale": 0, "guidance_scale_2": 0, "boundary_ratio": 0, "cache": 0, "seed": 0}
    with in_a_thread(tmp_path, resolved(models=models)) as url:
        body = {"prompt": "a cat", "size": "64x64", "num_frames": 9} | zeros
        video = httpx.post(f"{url}/v1/videos", json=body).raise_for_status().json()
        page = open_page(url)
        ended(page, video["id"]).get_by_role("button", name="Copy as curl").click()
        sent = curl_request(page.evaluate("navigator.clipboard.readText()"))
        assert {name: sent.get(name) for name in zeros} == zeros
        assert "preview" not in sent and "cinematography" not in sent
        again = httpx.post(f"{url}/v1/videos", json=sent).raise_for_status().json()
        assert {name: again[name] for name in zeros} == zeros


def error(message, code, status, **headers):
    body = {"error": {"message": message, "type": "t", "param": None, "code": code}}
    return {"status": status, "headers": headers, "json": body}


def test_it_says_that_the_service_warms_up_until_it_is_ready(service, open_page):
    waiting = [True]

    def ready(route):
        if waiting:
            route.fulfill(**error("waiting for HighNoiseExpert", "not_ready", 503))
        else:
            route.continue_()

    page = open_page(service.url, routes=[("**/ready", ready)])
    page.get_by_text("The service is warming up.").wait_for()
    assert "Waiting for HighNoiseExpert" in page.locator("#banner").inner_text()
    waiting.clear()
    page.locator("#banner").wait_for(state="hidden")
    assert page.locator("#service").inner_text() == "Ready"


def test_it_says_that_the_service_is_full_and_counts_down(service, open_page):
    full = error("the queue is full", "queue_full", 429, **{"Retry-After": "2"})
    page = open_page(service.url)
    page.route(
        "**/v1/videos",
        lambda route: (
            route.fulfill(**full) if route.request.method == "POST" else route.continue_()
        ),
    )
    fill_small(page, "one more", steps=4, model="t2v")
    page.get_by_role("button", name="Make video").click()
    page.get_by_role("alert").filter(has_text="The service is full").wait_for()
    page.get_by_role("button", name=re.compile("^Try again in [12] s$")).wait_for()
    page.get_by_text("There may be room again").wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value() == "one more"
    page.get_by_role("button", name="Make video").wait_for()


def test_a_lost_service_is_said_and_sending_again_makes_one_video(service, open_page):
    page = open_page(service.url)
    page.locator('#service[data-state="ready"]').wait_for()
    keys = []

    def lose(route):
        if route.request.method != "POST":
            return route.continue_()
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 1:
            return route.continue_()
        route.fetch()  # it arrives, and its answer is lost
        return route.abort()

    page.route("**/v1/videos", lose)
    page.route("**/ready", lambda route: route.abort())
    fill_small(page, "only once", steps=4, model="t2v")
    page.get_by_role("button", name="Make video").click()
    page.get_by_role("alert").filter(has_text="cannot be reached").wait_for()
    page.evaluate("window.dispatchEvent(new Event('online'))")
    page.locator("#banner").get_by_text("The service cannot be reached.").wait_for()
    page.unroute("**/ready")
    page.get_by_role("button", name="Make video").click()
    page.get_by_role("heading", name="only once").first.wait_for()
    page.get_by_role("button", name="Try now").click()
    page.locator("#banner").wait_for(state="hidden")
    assert keys[0] == keys[1]
    videos = httpx.get(f"{service.url}/v1/videos", params={"limit": 10}).json()["data"]
    assert [video["prompt"] for video in videos].count("only once") == 1


def test_a_login_page_in_its_place_is_no_service(open_page, tmp_path):
    between = [True]

    def ready(route):
        if between:
            route.fulfill(body="<!doctype html><title>Log in</title>", content_type="text/html")
        else:
            route.continue_()

    with in_a_thread(tmp_path) as url:
        page = open_page(url, routes=[("**/ready", ready)])
        page.locator("#banner").get_by_text("The service cannot be reached.").wait_for()
        between.clear()
        page.locator("#banner").wait_for(state="hidden")
        assert page.locator("#service").inner_text() == "Ready"


class CutOff(socketserver.StreamRequestHandler):
    """Answers with the beginning of a list, and hangs up."""

    def handle(self):
        while self.rfile.readline().strip():
            pass
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
            b'{"object": "list", "data": ['
        )


@pytest.fixture
def cut_off():
    """The URL of a server whose answers are all cut off."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), CutOff) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("kind", ["a proxy's page", "cut off"])
def test_an_answer_that_cannot_be_read_is_said_and_the_page_goes_on(
    open_page, tmp_path, cut_off, kind
):
    unreadable, keys = [True], []

    def answer(route):
        if route.request.method == "POST":
            keys.append(route.request.headers["idempotency-key"])
        if not unreadable:
            route.continue_()
        elif kind == "cut off":
            route.continue_(url=cut_off)
        else:
            route.fulfill(body="<!doctype html><title>Log in</title>", content_type="text/html")

    with in_a_thread(tmp_path) as url:
        page = open_page(url)
        page.clock.install()
        page.reload()
        page.get_by_text("No videos yet").wait_for()
        page.route("**/v1/videos*", answer)
        with page.expect_event("request", lambda request: "limit" in request.url):
            page.clock.fast_forward(15_000)  # to the next look
        page.get_by_label("Prompt", exact=True).fill("only once")
        page.get_by_role("button", name="Make video").click()
        page.get_by_role("alert").filter(has_text="was cut off or is not the service's").wait_for()
        unreadable.clear()
        httpx.post(f"{url}/v1/videos", json={"prompt": "made elsewhere"}).raise_for_status()
        page.clock.fast_forward(15_000)
        page.get_by_role("heading", name="made elsewhere").wait_for()
        page.get_by_role("button", name="Make video").click()
        page.get_by_role("heading", name="only once").wait_for()
        assert keys[0] == keys[1]


def test_it_fits_a_phone_is_dark_in_the_dark_and_is_usable_by_keyboard(service, open_page):
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True}
    page = open_page(service.url, **phone)
    page.get_by_label("Model", exact=True).locator("option[value=t2v]").wait_for(state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert brightness(page) < 60
    focused = []
    for _ in range(12):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    for field in ("prompt", "model", "size", "num_frames", "num_inference_steps", "seed"):
        assert field in focused
    assert focused.index("prompt") < focused.index("seed")
    page.emulate_media(color_scheme="light")
    assert brightness(page) > 200


def brightness(page):
    """Of the page's upper left corner, as it is drawn."""
    pixels = Image.open(io.BytesIO(page.screenshot())).convert("L")
    return pixels.getpixel((3, 300))
