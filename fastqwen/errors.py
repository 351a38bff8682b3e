"""Every mistake that a user can make, as a type.

    FastqwenError            the user's mistake: one clear line, no traceback
    ├── BadRequest           a field of a request; ``param`` names it
    ├── UnknownModelName     a request names a model that is not served, and the server was told to mind
    ├── Overloaded           too much work at once; try again later
    ├── EngineGone           the engine process ended while a request was running
    ├── ReadersGone          the processes that read prompts were stopped or killed, whatever the prompt was
    ├── GenerationFailed     the engine took the request, but could not finish it
    ├── UpstreamGone         the server that `fastqwen web` shows a page for does not answer as it should
    ├── ModelNotFound        nothing is at the place that the model name points to
    ├── BadCheckpoint        a file of the checkpoint is damaged or contradicts another one
    │   └── Unsupported      the checkpoint is well-formed, but asks for something that fastqwen does not do
    ├── BadConfig            a flag or an argument has a value that cannot work
    └── DoesNotFit           the model or its cache is larger than the memory

Our own mistakes are plain assertions and built-in exceptions: they end in the log with a traceback.
"""

from __future__ import annotations


class FastqwenError(Exception):
    """A mistake in what the user gave; its text is one line that says what to do."""


class BadRequest(FastqwenError):
    """A request that cannot be served as written. ``param`` is the field's name in the request body."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModelName(FastqwenError):
    """The request names a model that is not served, and the server was told to mind."""


class Overloaded(FastqwenError):
    """More work than the server accepts at once."""


class EngineGone(FastqwenError):
    """The engine process ended while the request was running."""


class ReadersGone(FastqwenError):
    """The processes that render and tokenise prompts were stopped, killed or could not be started."""


class GenerationFailed(FastqwenError):
    """The engine accepted the request, but could not finish it."""


class UpstreamGone(FastqwenError):
    """The server behind this one does not answer, or not as an OpenAI-compatible one does."""


class ModelNotFound(FastqwenError):
    """There is no model under that name."""


class BadCheckpoint(FastqwenError):
    """A checkpoint file is damaged, missing, or contradicts another one."""


class Unsupported(BadCheckpoint):
    """A well-formed checkpoint that needs something fastqwen does not have."""


class BadConfig(FastqwenError):
    """A flag or an argument has a value that cannot work."""


class DoesNotFit(FastqwenError):
    """The model, or one sequence of the wished length, needs more memory than there is."""
