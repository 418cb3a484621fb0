"""What a language model is told when it is to write a prompt out: one text per task and language.

Owns the texts (instructions/*.txt, this project's own), how a request is put to the model and what
of its answer is kept. The rules are those of the reference's prompt extension: keep what was asked
for, make it visible, say how it is lit and filmed. Pure: knows no model, tokenizer or service.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Task = Literal["t2v", "i2v", "image"]
Language = Literal["zh", "en"]

TASKS: tuple[Task, ...] = ("t2v", "i2v", "image")
LANGUAGES: tuple[Language, ...] = ("zh", "en")

_FOLDER = Path(__file__).parent / "instructions"


def instructions(task: Task, language: Language) -> str:
    """The system message. `image` is one still frame, `i2v` a video that begins with a picture.

    Raises ValueError for a task or a language that is none of these.
    """
    if task not in TASKS or language not in LANGUAGES:
        raise ValueError(
            f"no instructions for task {task!r} in language {language!r}: there are"
            f" {', '.join(TASKS)} in {' and '.join(LANGUAGES)}"
        )
    return (_FOLDER / f"{task}_{language}.txt").read_text(encoding="utf-8").strip()


def request(prompt: str, language: Language) -> str:
    """The user message. The prompt never stands alone in it: a client's text must not be taken for
    anything else (DashScope's SDK uploads the file that a message consisting of a path names)."""
    return f"{'原始描述' if language == 'zh' else 'Description'}:\n{prompt}"


def one_paragraph(answer: str) -> str:
    """An answer without line breaks, control characters and quotation marks around the whole.

    Raises ValueError when nothing is left.
    """
    words = ("".join(filter(str.isprintable, word)) for word in answer.split())
    text = " ".join(filter(None, words))
    for opening, closing in ('""', "“”", "''"):
        inner = text[1:-1]
        quoted = len(text) > 1 and text[0] == opening and text[-1] == closing
        if quoted and opening not in inner and closing not in inner:
            text = inner.strip()
    if not text:
        raise ValueError("the language model answered nothing")
    return text
