"""A logger for TensorRT that keeps errors for messages instead of printing them."""

from typing import Any


def error_log(trt: Any) -> Any:
    """A logger of the module `trt`, with `take()`: the errors since the last call, in one line. Thread-safe."""

    class ErrorLog(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self._errors.append(message)

        def take(self) -> str:
            errors, self._errors = self._errors, []
            return "; ".join(errors)

    return ErrorLog()
