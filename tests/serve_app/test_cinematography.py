"""The cinematic controls: their vocabulary, their sentence, and how a request carries them."""

import json

import pytest
from http_service import http_service

from serve_app.cinematography import VOCABULARY, Cinematography, compose
from serve_app.create_video import nest_form_fields, parse_create
from serve_app.errors import InvalidRequest

CHOSEN = {"lens": "fisheye lens", "style": "pixel art", "time_of_day": "night"}


def parsed(cinematography):
    return parse_create({"prompt": "a cat", "cinematography": cinematography}).cinematography


def test_the_issues_ten_controls_are_there_each_with_values_and_a_description():
    assert set(VOCABULARY) == {
        "lighting_type", "lighting_source", "time_of_day", "shot_size", "composition",
        "camera_angle", "lens", "camera_movement", "colour_tone", "style",
    }  # fmt: skip
    for field in VOCABULARY.values():
        assert field["description"]
        assert len(set(field["values"])) == len(field["values"]) >= 5


def test_the_order_in_the_prompt_is_the_vocabularys_and_not_the_requests():
    composed = compose("a cat sleeps", CHOSEN)
    assert composed == "Pixel art, night, fisheye lens. a cat sleeps"
    assert compose("a cat sleeps", dict(reversed(CHOSEN.items()))) == composed


@pytest.mark.parametrize("nothing", [None, {}])
def test_without_a_choice_the_prompt_is_untouched(nothing):
    assert compose(" a cat ", nothing) == " a cat "


def test_an_object_in_which_nothing_is_chosen_is_none():
    assert parsed({}).chosen() is None
    assert parsed({"lens": None}).chosen() is None


def test_every_value_is_accepted_and_lands_in_the_prompt():
    for name, field in VOCABULARY.items():
        for value in field["values"]:
            chosen = Cinematography.model_validate({name: value}).chosen()
            assert value.lower() in compose("x", chosen).lower()


@pytest.mark.parametrize(
    "given, param, code, word",
    [
        ({"lens": "wide"}, "cinematography.lens", "invalid_value", "no value 'wide'; there are"),
        ({"lenses": "medium lens"}, "cinematography.lenses", "unknown_field", "lenses"),
        ({"lens": ["medium lens"]}, "cinematography.lens", "invalid_value", "no value"),
        ("medium lens", "cinematography", "invalid_value", "neither"),
    ],
)
def test_what_is_unknown_is_refused_by_name(given, param, code, word):
    with pytest.raises(InvalidRequest) as refused:
        parsed(given)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert word in refused.value.message


def test_a_form_carries_it_in_brackets_or_as_json():
    bracketed = [(f"cinematography[{name}]", value) for name, value in CHOSEN.items()]
    fields = nest_form_fields([("prompt", "a cat"), *bracketed])
    assert parse_create(fields).cinematography.chosen() == parsed(CHOSEN).chosen()
    assert parsed(json.dumps(CHOSEN)) == parsed(CHOSEN)


@pytest.mark.anyio
async def test_the_answer_keeps_the_prompt_and_shows_what_is_encoded(tmp_path):
    async with http_service(tmp_path) as service, service.client() as client:
        listed = (await client.get("/v1/cinematography")).json()
        assert listed["object"] == "cinematography"
        assert "fisheye lens" in listed["fields"]["lens"]["values"]
        form = {"prompt": "a cat", "model": "wan-tiny", "cinematography[lens]": "fisheye lens"}
        made = (await client.post("/v1/videos", data=form, files={"x": ("", b"")})).json()
        assert made["prompt"] == "a cat"
        assert made["revised_prompt"] == "Fisheye lens. a cat"
        assert made["cinematography"] == {"lens": "fisheye lens"}
        assert (await client.get(f"/v1/videos/{made['id']}")).json() == made
        plain = (await client.post("/v1/videos", json={"prompt": "a cat"})).json()
        assert plain["revised_prompt"] is None and plain["cinematography"] is None
