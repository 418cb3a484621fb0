"""Cinematography: how a shot is lit, framed and moved, as named choices instead of prose.

Owns the vocabulary and the sentence that a choice becomes. The words are those that the makers'
prompt guide for Wan2.2 says the model was trained to tell apart. Pure: knows nothing about HTTP,
jobs or models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Style = Literal[
    "anime", "3D cartoon", "3D game", "pixel art", "clay animation", "puppet animation",
    "felt animation", "watercolor painting", "oil painting", "ink painting",
    "black and white animation", "tilt-shift photography", "time-lapse", "documentary",
    "cinematic film",
]  # fmt: skip
LightingSource = Literal[
    "daylight", "sunlight", "moonlight", "overcast light", "firelight", "fluorescent light",
    "practical light", "artificial light", "mixed light",
]  # fmt: skip
LightingType = Literal[
    "soft light", "hard light", "top light", "side light", "underlight", "rim light", "backlight",
    "silhouette", "high contrast light", "low contrast light",
]  # fmt: skip
TimeOfDay = Literal["dawn", "sunrise", "daytime", "dusk", "sunset", "night"]
ShotSize = Literal[
    "extreme close-up", "close-up", "medium close-up", "medium shot", "medium wide shot",
    "full shot", "wide shot", "extreme wide shot",
]  # fmt: skip
Composition = Literal[
    "center composition", "balanced composition", "symmetrical composition",
    "left-weighted composition", "right-weighted composition", "short-side composition",
]  # fmt: skip
CameraAngle = Literal[
    "eye-level angle", "high angle", "low angle", "dutch angle", "over-the-shoulder angle",
    "aerial view", "top-down view",
]  # fmt: skip
Lens = Literal[
    "wide-angle lens", "medium lens", "long-focus lens", "telephoto lens", "fisheye lens",
]  # fmt: skip
ColourTone = Literal[
    "warm colors", "cool colors", "mixed colors", "saturated colors", "desaturated colors",
]  # fmt: skip
CameraMovement = Literal[
    "static camera", "push in", "pull out", "pan left", "pan right", "tilt up", "tilt down",
    "tracking shot", "arc shot", "handheld camera", "compound move",
]  # fmt: skip


class Cinematography(BaseModel):
    """Any of these; each takes one value. The order here is their order in the prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    style: Style | None = Field(None, description="The medium, or the treatment of the whole")
    lighting_source: LightingSource | None = Field(None, description="Where the light comes from")
    lighting_type: LightingType | None = Field(None, description="How the light falls")
    time_of_day: TimeOfDay | None = Field(None, description="When it is")
    shot_size: ShotSize | None = Field(None, description="How much of the subject is in the frame")
    composition: Composition | None = Field(None, description="Where the subject is in the frame")
    camera_angle: CameraAngle | None = Field(None, description="From where the camera looks")
    lens: Lens | None = Field(None, description="How far it reaches and how it bends")
    colour_tone: ColourTone | None = Field(None, description="The grade of the picture")
    camera_movement: CameraMovement | None = Field(None, description="What the camera does")

    @field_validator("*", mode="before")
    @classmethod
    def _is_in_the_vocabulary(cls, value: Any, info: Any) -> Any:
        values = VOCABULARY[info.field_name]["values"]
        if value is not None and value not in values:
            raise ValueError(f"no value {str(value)[:64]!r}; there are {', '.join(values)}")
        return value

    def chosen(self) -> dict[str, str] | None:
        """What was chosen, in the order of the fields; None when nothing was."""
        return self.model_dump(exclude_none=True) or None


def _values(field: str) -> list[str]:
    literal, _none = get_args(Cinematography.model_fields[field].annotation)
    return list(get_args(literal))


VOCABULARY: dict[str, dict[str, Any]] = {
    name: {"description": field.description, "values": _values(name)}
    for name, field in Cinematography.model_fields.items()
}
"""Field -> what it says and its values, in the order of the prompt."""


def from_text(value: Any) -> Any:
    """A form may carry the whole object as JSON in one field."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError("neither an object nor the JSON of one") from error


def compose(prompt: str, chosen: Mapping[str, str] | None) -> str:
    """The prompt with the choices before it, as one sentence in the vocabulary's order.

    Before, because the text encoder cuts what is too long at its end, and because that is where
    the makers' own examples have them.
    """
    if not chosen:
        return prompt
    words = ", ".join(chosen[name] for name in VOCABULARY if name in chosen)
    return f"{words[0].upper()}{words[1:]}. {prompt}"
