"""Prompt extension through DashScope's own SDK, against a DashScope on loopback."""

import base64
import builtins
import io
import time

import pytest
from dashscope_stub import TEXT_PATH, VISION_PATH, dashscope_stub
from PIL import Image

from wan_model import dashscope_extender as module
from wan_model.dashscope_extender import DashScopeExtenderEngine
from wan_model.prompt_instructions import instructions


@pytest.fixture(scope="module")
def server():
    with dashscope_stub() as stub:
        yield stub


@pytest.fixture
def stub(server, monkeypatch):
    monkeypatch.setattr(module, "RETRY_DELAY_S", 0.01)
    server.replies, server.delay_s, server.asked = [(200, "A cat, at length.")], 0.0, []
    return server


def engine(stub, **options):
    given = {"checkpoint": "qwen-plus", "vl_checkpoint": "qwen-vl-max", "target_language": "zh"}
    return DashScopeExtenderEngine(**given, api_key="sk-1", api_url=stub.url, **options)


def picture(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "orange").save(file, "PNG")
    return file.getvalue()


def test_text_goes_to_the_text_model_with_the_instructions_and_the_seed(stub):
    answer = engine(stub).extend("a cat", task="t2v", image=None, seed=2**31 + 7)
    assert answer == "A cat, at length."
    [asked] = stub.asked
    assert (asked["path"], asked["model"], asked["key"]) == (TEXT_PATH, "qwen-plus", "Bearer sk-1")
    system, user = asked["input"]["messages"]
    assert system == {"role": "system", "content": instructions("t2v", "zh")}
    assert "a cat" in user["content"]
    assert asked["parameters"]["seed"] == 7
    assert asked["parameters"]["max_tokens"] == 512


def test_a_picture_goes_to_the_vision_model_and_is_shrunk(stub):
    engine(stub).extend("it moves", task="i2v", image=picture(1600, 900), seed=1)
    [asked] = stub.asked
    assert (asked["path"], asked["model"]) == (VISION_PATH, "qwen-vl-max")
    sent, text = asked["input"]["messages"][1]["content"]
    head, data = sent["image"].split(",")
    assert head == "data:image/jpeg;base64"
    size = Image.open(io.BytesIO(base64.b64decode(data))).size
    assert 500 * 500 < size[0] * size[1] <= 512 * 512
    assert "it moves" in text["text"]


def test_a_prompt_that_names_a_file_uploads_nothing(stub, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("password")
    for prompt in (str(secret), f"file://{secret}"):
        engine(stub).extend(prompt, task="i2v", image=picture(64, 64), seed=1)
    assert [asked["path"] for asked in stub.asked] == [VISION_PATH] * 2


def test_a_service_that_is_overloaded_is_asked_again(stub):
    stub.replies = [(429, "Throttling"), (503, "Busy"), (500, "Oops"), (200, "Yes.")]
    assert engine(stub).extend("a cat", task="t2v", image=None, seed=1) == "Yes."
    assert len(stub.asked) == 4


def test_four_tries_are_all(stub):
    stub.replies = [(429, "Throttling")]
    with pytest.raises(ValueError, match="429 Throttling"):
        engine(stub).extend("a cat", task="t2v", image=None, seed=1)
    assert len(stub.asked) == 4


def test_a_refusal_is_not_asked_again(stub):
    stub.replies = [(400, "DataInspectionFailed")]
    with pytest.raises(ValueError, match="DataInspectionFailed"):
        engine(stub).extend("a cat", task="t2v", image=None, seed=1)
    assert len(stub.asked) == 1


def test_a_slow_service_ends_at_the_deadline_of_all_tries_together(stub):
    stub.delay_s = 1.0
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        engine(stub, timeout_s=0.3).extend("a cat", task="t2v", image=None, seed=1)
    assert time.monotonic() - began < 0.9


def test_an_empty_answer_is_a_failure(stub):
    stub.replies = [(200, " \n")]
    with pytest.raises(ValueError, match="nothing"):
        engine(stub).extend("a cat", task="t2v", image=None, seed=1)


def test_nobody_there_is_a_failure(monkeypatch):
    monkeypatch.setattr(module, "RETRY_DELAY_S", 0.01)
    there_is_none = DashScopeExtenderEngine(
        checkpoint="qwen-plus", vl_checkpoint=None, target_language="en",
        api_key="sk-1", api_url="http://127.0.0.1:9/api/v1", timeout_s=20,
    )  # fmt: skip
    with pytest.raises(ValueError, match="DashScope did not answer"):
        there_is_none.extend("a cat", task="t2v", image=None, seed=1)


def test_without_the_sdk_the_error_says_what_to_install(stub, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "dashscope":
            raise ModuleNotFoundError("No module named 'dashscope'", name="dashscope")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'wan-serve\[dashscope\]'"):
        engine(stub)
