"""Every exception deltamoe raises on purpose.

    DeltamoeError                 catch this one to catch them all
    ├── ConfigError               a key, a value or a combination that cannot work     exit 2
    ├── BadFileError              a file from outside is not what it should be         exit 3
    │   ├── CheckpointError       a checkpoint is missing, torn, foreign or too new
    │   └── DataError             a text, a shard or a manifest is broken
    ├── DoesNotFitError           memory or disk is too small for what was asked       exit 4
    ├── BackendUnavailableError   an operator backend was asked for by name, in vain   exit 1
    ├── RunInUseError             another process trains in this run folder            exit 1
    ├── NonFiniteError            training met a NaN or an infinity and stopped        exit 1
    └── Interrupted               a signal stopped training; the run can be resumed    exit 75

The message is written for the person at the keyboard: what was expected, what came, what to do.
A programming mistake (a tensor of the wrong shape) raises ``ValueError`` as everywhere in Python.
"""

__all__ = [
    "BackendUnavailableError",
    "BadFileError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeltamoeError",
    "DoesNotFitError",
    "Interrupted",
    "NonFiniteError",
    "RunInUseError",
]


class DeltamoeError(Exception):
    """Base of every error raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code: int = 1


class ConfigError(DeltamoeError):
    """A configuration key, value or combination that cannot work."""

    exit_code = 2


class BadFileError(DeltamoeError):
    """A file that came from outside is not what it should be."""

    exit_code = 3


class CheckpointError(BadFileError):
    """A checkpoint is missing, torn, foreign, or newer than this program."""


class DataError(BadFileError):
    """A text file, a token shard or a data manifest is broken."""


class DoesNotFitError(DeltamoeError):
    """Memory or disk is too small for what was asked."""

    exit_code = 4


class BackendUnavailableError(DeltamoeError):
    """An operator backend was asked for by name and cannot run here."""


class RunInUseError(DeltamoeError):
    """Another process is training in the same run folder."""


class NonFiniteError(DeltamoeError):
    """Training met a NaN or an infinity and stopped before the update."""


class Interrupted(DeltamoeError):  # noqa: N818  (it is news, not a fault)
    """A signal asked training to stop; a checkpoint was written and the run can be resumed."""

    exit_code = 75
