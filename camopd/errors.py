"""Errors that are not the value of one argument. Each message names the value, the reason and the way out."""


class CaMOPDError(RuntimeError):
    """Something outside the configuration went wrong: a teacher, a checkpoint, a file."""


class TeacherError(CaMOPDError):
    """A teacher cannot be reached, or what it answers cannot be used."""


class ResumeError(CaMOPDError):
    """A checkpoint belongs to another run than the one that wants to go on from it."""


class DataError(CaMOPDError):
    """A dataset cannot be fetched or read, or does not hold what a builder needs."""
