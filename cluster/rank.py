"""One rank: its engine, loaded by import string, called one method at a time.

What a call did is an Outcome, a value, also when it raised, so that errors reach the leader as
themselves. Knows no Ray, no process boundary and no model; torch comes in only with the engine.
"""

import importlib
import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import EngineError
from cluster.process_group import breaks_the_rank
from cluster.spec import GroupSpec

_TEXT_ONLY = ("torch",)  # rebuilding these classes would import the package into the leader


@dataclass(frozen=True, kw_only=True)
class Raised:
    """An exception on its way to the leader."""

    pickled: bytes
    summary: str
    traceback: str
    breaks_the_rank: bool

    @classmethod
    def of(cls, error: Exception) -> "Raised":
        return cls(
            pickled=pickle.dumps(_travelling(error)),
            summary=f"{type(error).__name__}: {error}",
            traceback="".join(traceback.format_exception(error)),
            breaks_the_rank=breaks_the_rank(error),
        )

    def rebuild(self) -> Exception:
        """The exception itself, with the rank's traceback as a note."""
        try:
            error = pickle.loads(self.pickled)
        except Exception as unpickling:  # its module may be missing on this side only
            error = EngineError(f"{self.summary} (cannot be rebuilt here: {unpickling})")
        error.add_note(f"Traceback in the worker:\n{self.traceback}")
        return error


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank's call did: a value (None unless this rank was asked for it) or an error."""

    value: Any = None
    raised: Raised | None = None


class Rank:
    """One rank's engine. All calls come from one thread: CUDA's current device is per thread."""

    def __init__(self, spec: GroupSpec) -> None:
        self._spec = spec
        self._engine: Any = None

    def load(self) -> Outcome:
        """Import and construct the engine."""

        def construct() -> None:
            module, _, name = self._spec.engine.partition(":")
            engine_class = getattr(importlib.import_module(module), name)
            self._engine = engine_class(**self._spec.resolved_engine_kwargs())

        return outcome_of(construct)

    def run(
        self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, keep_value: bool
    ) -> Outcome:
        """Call one engine method; `keep_value` says whether the leader wants its result."""
        outcome = outcome_of(lambda: getattr(self._engine, method)(*args, **kwargs))
        return outcome if keep_value or outcome.raised else Outcome()


def outcome_of(call: Callable[[], Any]) -> Outcome:
    """What `call()` did, as a value."""
    try:
        return Outcome(value=call())
    except Exception as error:
        return Outcome(raised=Raised.of(error))


def _travelling(error: Exception) -> Exception:
    """`error` if it survives pickling, else its nearest built-in class with the same text."""
    package = type(error).__module__.partition(".")[0]
    if package not in _TEXT_ONLY and _survives_pickling(error):
        return error
    summary = f"{type(error).__name__}: {error}"
    for cls in type(error).__mro__:
        if cls.__module__ == "builtins" and cls not in (Exception, BaseException, object):
            try:
                return cls(summary)
            except TypeError:  # e.g. UnicodeDecodeError, which takes five arguments
                continue
    return EngineError(summary)


def _survives_pickling(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # any class may refuse in its own way
        return False
    return True
