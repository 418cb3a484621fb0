"""The web page's files over HTTP: who may have them, with which headers."""

import re

import pytest
from http_service import http_service, resolved

from serve_app.page.files import CONTENT_SECURITY_POLICY, page_files

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(tmp_path):
    """Of a service that asks for keys; this client has none."""
    async with (
        http_service(tmp_path, resolved(api_keys="key-one")) as service,
        service.client() as client,
    ):
        yield client


async def test_the_page_and_its_files_need_no_key(client):
    index = await client.get("/")
    assert index.status_code == 200
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    assert (await client.get("/v1/models")).status_code == 401
    named = set(re.findall(r'(?:href|src)="(page/[\w.]+)"', index.text))
    for file in page_files():
        named |= {f"page/{n}" for n in re.findall(r'from "\./(\w+\.js)"', await text(client, file))}
    assert named == {f"page/{name}" for name in page_files() if name != "index.html"}
    for name in named:
        assert (await client.get(f"/{name}")).status_code == 200, name


async def text(client, file: str) -> str:
    return (await client.get(f"/page/{file}")).text


async def test_nothing_comes_from_elsewhere_and_nothing_is_inline(client):
    answer = await client.get("/")
    assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none';")
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", answer.text)
    for name in page_files():
        links = re.findall(r"https?://[^\s\"')]+", await text(client, name))
        assert set(links) <= {"http://www.w3.org/2000/svg"}, name


async def test_generated_text_cannot_become_markup(client):
    scripts = [await text(client, name) for name in page_files() if name.endswith(".js")]
    assert len(scripts) > 5
    for script in scripts:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", script)


async def test_a_browser_that_has_the_file_is_told_so(client):
    first = await client.get("/page/style.css")
    assert first.headers["cache-control"] == "no-cache"
    etag = first.headers["etag"]
    again = await client.get("/page/style.css", headers={"If-None-Match": f'"old", W/{etag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == etag
    changed = await client.get("/page/style.css", headers={"If-None-Match": '"old"'})
    assert changed.status_code == 200


async def test_head_is_get_without_a_body(client):
    for path in ("/", "/page/page.js"):
        whole, head = await client.get(path), await client.head(path)
        assert head.status_code == 200
        assert head.content == b""
        assert head.headers["content-length"] == str(len(whole.content))
        assert head.headers["etag"] == whole.headers["etag"]


@pytest.mark.parametrize("path", ["/page/", "/page/files.py", "/page/..%2fconfig.py", "/page/x.js"])
async def test_only_the_pages_own_files_are_served(client, path):
    assert (await client.get(path)).status_code == 404
    assert "files.py" not in page_files()
