"""Errors that decide what happens to the work a build has done so far. Any other ``UserError`` keeps it."""

from __future__ import annotations

from catgan.command import UserError


class ResumableError(UserError):
    """A failure outside the user's control, such as the network or a full disk; running the same command continues."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; the work so far is kept: run the same command to continue")


class NoUsableImageError(UserError):
    """No image of the sources can be used. The work so far is deleted: continuing would give the same result."""
