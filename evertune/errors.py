"""The errors a user can meet. Each message says where, what was found, what was expected and what to do.

    EvertuneError
      RecipeError        a recipe, a flag or an override is wrong                  exit 3   also a ValueError
      DataError          a training file or row is wrong                           exit 3   also a ValueError
      ProbeError         a probe file, item or verifier is wrong                   exit 3   also a ValueError
      MergeError         the inputs of a merge do not fit together                 exit 3   also a ValueError
      CheckpointError    a model or adapter folder is not what it should be        exit 5   also a ValueError
      IntegrityError     bytes on disk differ from what was recorded               exit 5   also a RuntimeError
      WorkspaceError     the workspace is locked, full or cannot be written        exit 5   also a RuntimeError
      TrainingError      a stage diverged or its process died                      exit 5   also a RuntimeError

Anything else that reaches the command line is our own bug: exit 1, traceback in a file.
"""


class EvertuneError(Exception):
    """Base of all errors that are the input's or the machine's, not ours.

    Args:
        message: one line: where, what was found, what was expected.
        remedy: what the reader can do about it, or "".
    """

    exit_code = 3

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message if not remedy else f"{message} {remedy}")
        self.message = message
        self.remedy = remedy


class RecipeError(EvertuneError, ValueError):
    """A recipe, an override or a command-line value is wrong."""


class DataError(EvertuneError, ValueError):
    """A training file or one of its rows is wrong."""


class ProbeError(EvertuneError, ValueError):
    """A probe file, an item or a verifier is wrong."""


class MergeError(EvertuneError, ValueError):
    """The inputs of a merge do not fit together."""


class CheckpointError(EvertuneError, ValueError):
    """A model or adapter folder is not what it should be."""

    exit_code = 5


class IntegrityError(EvertuneError, RuntimeError):
    """Bytes on disk differ from what was recorded."""

    exit_code = 5


class WorkspaceError(EvertuneError, RuntimeError):
    """The workspace is locked, full or cannot be written."""

    exit_code = 5


class TrainingError(EvertuneError, RuntimeError):
    """A stage diverged (NaN, Inf) or its process died. The last good checkpoint is intact."""

    exit_code = 5
