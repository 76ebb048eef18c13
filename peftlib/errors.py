"""The one error family: each message says what was given, what was expected and how to fix it."""


class PeftlibError(ValueError):
    """Base of every error peftlib raises about its inputs."""


class TargetError(PeftlibError):
    """A target that matches nothing, cannot carry the method, or is never executed."""


class ProbeError(PeftlibError):
    """The example could not be followed, or is needed and missing."""


class StateError(PeftlibError):
    """An operation that the tuning's present state does not allow (detached, merged, duplicate name)."""


class CheckpointError(PeftlibError):
    """A file that is damaged, made for another base, or does not say what it should."""
