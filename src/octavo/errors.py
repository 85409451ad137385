"""Errors that a user can act on. Each message names the culprit, what was found, what was expected and the way out."""


class OctavoError(ValueError):
    """Base of everything octavo raises for a user; the command line turns it into one sentence and exit code 1."""


class CheckpointError(OctavoError):
    """A checkpoint's files, headers, config or values do not add up. Nothing was loaded."""


class EngineError(OctavoError):
    """An engine or numerics mode was asked for that cannot run here."""


class AdapterError(OctavoError):
    """An adapter targets nothing, reaches raw codes, gets no gradient, or cannot be applied."""


class ConfigError(OctavoError):
    """A run's configuration is wrong: unknown key, impossible value, missing file."""


def first_line(error: BaseException) -> str:
    """What ``error`` says in its first line, for a message of ours; its kind, where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
