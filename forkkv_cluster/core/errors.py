"""Every error a user can see, and the status it becomes on each wire.

    ForkKVError
    ├── InvalidArgument      INVALID_ARGUMENT     400   a field has a bad value: names it, and the remedy
    │   └── Unsupported      UNIMPLEMENTED        400   a known feature that this engine refuses by name
    ├── Unauthenticated      UNAUTHENTICATED      401   no bearer token, or one that the server does not know
    ├── NotFound             NOT_FOUND            404   unknown session, branch or adapter
    ├── AlreadyExists        ALREADY_EXISTS       409   a name that must be unique is taken
    ├── FailedPrecondition   FAILED_PRECONDITION  409   right request, wrong state
    ├── Aborted              ABORTED              409   lost a race, for example a branch that runs a turn
    ├── ResourceExhausted    RESOURCE_EXHAUSTED   429   overload: carries a retry hint
    ├── DeadlineExceeded     DEADLINE_EXCEEDED    504   the client's deadline passed
    ├── Cancelled            CANCELLED            499   the client went away
    ├── Unavailable          UNAVAILABLE          503   a collaborator is gone: retry elsewhere
    │   └── WorkerStopped                                a worker ends, or its engine failed: the gateway resumes elsewhere
    └── Internal             INTERNAL             500   a bug of ours

All of them survive pickling, because they cross process borders.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ForkKVError(Exception):
    """Root of the tree. ``code`` is the gRPC status name, ``http_status`` its HTTP twin."""

    code: ClassVar[str] = "UNKNOWN"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, **attributes: Any) -> None:
        super().__init__(message)
        self.message = message
        self.attributes = attributes

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.attributes)

    def __str__(self) -> str:
        return self.message


def _rebuild(cls: type[ForkKVError], message: str, attributes: dict[str, Any]) -> ForkKVError:
    error = cls.__new__(cls)
    ForkKVError.__init__(error, message, **attributes)
    return error


class InvalidArgument(ForkKVError):
    """A field of the request has a value that can never work.

    ``field`` is the public name of the field, ``value`` what was sent (shortened), ``remedy`` what to do.
    """

    code = "INVALID_ARGUMENT"
    http_status = 400

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field}={shown}: {problem}. {remedy}", field=field, value=shown, remedy=remedy)

    @property
    def field(self) -> str:
        return str(self.attributes["field"])


class Unsupported(InvalidArgument):
    """A known feature that this engine does not have; refused by name instead of served wrongly."""

    code = "UNIMPLEMENTED"


class Unauthenticated(ForkKVError):
    """The server has api_tokens and the request carries none of them."""

    code = "UNAUTHENTICATED"
    http_status = 401


class NotFound(ForkKVError):
    """``kind`` (session, branch, adapter) and ``name`` of what is not there."""

    code = "NOT_FOUND"
    http_status = 404

    def __init__(self, kind: str, name: str, remedy: str) -> None:
        super().__init__(f"{kind} {name!r} does not exist. {remedy}", kind=kind, name=name, remedy=remedy)


class AlreadyExists(ForkKVError):
    """``kind`` and ``name`` of what is there already."""

    code = "ALREADY_EXISTS"
    http_status = 409

    def __init__(self, kind: str, name: str, remedy: str) -> None:
        super().__init__(f"{kind} {name!r} exists already. {remedy}", kind=kind, name=name, remedy=remedy)


class FailedPrecondition(ForkKVError):
    """The request is sound but the state does not allow it."""

    code = "FAILED_PRECONDITION"
    http_status = 409


class Aborted(ForkKVError):
    """The request lost against a concurrent one; the same request may succeed later."""

    code = "ABORTED"
    http_status = 409


class ResourceExhausted(ForkKVError):
    """No room now. ``retry_after_s`` says when to try again; 0 means that retrying cannot help."""

    code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)

    @property
    def retry_after_s(self) -> float:
        return float(self.attributes["retry_after_s"])


class DeadlineExceeded(ForkKVError):
    """The deadline that the client set has passed; what it held is released."""

    code = "DEADLINE_EXCEEDED"
    http_status = 504


class Cancelled(ForkKVError):
    """The client cancelled or disconnected; what it held is released."""

    code = "CANCELLED"
    http_status = 499


class Unavailable(ForkKVError):
    """A collaborator is away; nothing was lost and the request may be sent again."""

    code = "UNAVAILABLE"
    http_status = 503


class WorkerStopped(Unavailable):
    """The worker takes and finishes no more requests. ``is_fault``: its engine failed, perhaps over this very request."""

    def __init__(self, message: str, *, is_fault: bool) -> None:
        super().__init__(message, is_fault=is_fault)

    @property
    def is_fault(self) -> bool:
        return bool(self.attributes["is_fault"])


class Internal(ForkKVError):
    """A broken promise of our own code."""

    code = "INTERNAL"
    http_status = 500


def unexpected(error: Exception) -> Internal:
    """What a client is told of an exception that nobody meant to raise; log its traceback where it was caught."""
    return Internal(f"{type(error).__name__}: {error}. This is a bug of the server; its log says more.")


def error_from(code: str, message: str, attributes: dict[str, Any]) -> ForkKVError:
    """The error again from what a wire carried of it: its status name, message and attributes. Unknown codes: Internal."""
    return _rebuild(_BY_CODE.get(code, Internal), message, attributes)


_BY_CODE: dict[str, type[ForkKVError]] = {
    error.code: error
    for error in (
        InvalidArgument,
        Unsupported,
        Unauthenticated,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        Aborted,
        ResourceExhausted,
        DeadlineExceeded,
        Cancelled,
        Unavailable,
        Internal,
    )
}
