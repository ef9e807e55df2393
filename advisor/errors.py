"""What advisor raises when it cannot answer: one line that says what, where, and what to do."""

from __future__ import annotations


class AdvisorError(Exception):
    """An explained failure. The command line prints it as one line and exits with *exit_code*."""

    exit_code = 1


class SpecError(AdvisorError):
    """A value that makes no sense, or values that contradict each other."""

    exit_code = 2


class UnknownNameError(AdvisorError):
    """A model, GPU or link that the catalog does not hold; the message lists near names."""

    exit_code = 2


class ConfigError(AdvisorError):
    """A model configuration that cannot be read or does not describe a known model."""


class WriteError(AdvisorError):
    """A folder or file that cannot be written, or that would be overwritten."""


class RunError(AdvisorError):
    """A training run that failed, took too long, or was not the one that was asked for."""


class NothingFitsError(AdvisorError):
    """A search that found no plan, where one was needed to go on."""

    exit_code = 3
