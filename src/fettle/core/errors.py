"""Every error fettle raises on purpose, so that a caller can choose what to catch.

A message states the rule, the value received and what to do.

FettleError                     exit code 1 at the command line
├── UsageError                  wrong usage: exit code 2
│   └── ProjectError            fettle.toml, or a callable it names
├── MissingExtra                an optional dependency is not installed
├── CaptureError                the model cannot be captured as a graph
├── ExportError                 a runtime cannot take the captured graph
├── DataError                   a loader yields nothing, or the wrong thing
├── InvalidInput                tensors that do not fit a signature
├── ArtifactError
│   ├── CorruptArtifact         a file is missing, truncated or altered
│   └── ForeignArtifact         not an artifact of ours, or of a format unknown here
├── RegistryError
│   ├── NotRegistered           no such model, version or alias
│   └── TamperedHistory         the audit log's hash chain is broken
└── MonitorError                no reference, no log, an alert channel misconfigured
    └── DeliveryFailed          a channel could not deliver (monitor/alerts/_base.py)
"""


class FettleError(Exception):
    """Root of every error fettle raises on purpose."""

    exit_code = 1


class UsageError(FettleError):
    """A call or a command that cannot mean anything."""

    exit_code = 2


class ProjectError(UsageError):
    """`fettle.toml`, or a callable it names, is not usable."""


class MissingExtra(FettleError):
    """An optional dependency is not installed; the message holds the pip line."""


class CaptureError(FettleError):
    """torch.export could not turn the model into one graph."""


class ExportError(FettleError):
    """A runtime could not take the captured graph."""


class DataError(FettleError):
    """A loader yields nothing, or batches that do not fit the model."""


class InvalidInput(FettleError):
    """Tensors that do not fit the signature: name, data type, shape or NaN."""


class ArtifactError(FettleError):
    """An artifact on disk cannot be used."""


class CorruptArtifact(ArtifactError):
    """A file of the artifact is missing, truncated or altered."""


class ForeignArtifact(ArtifactError):
    """The folder or file is no fettle artifact, or of a format unknown here."""


class RegistryError(FettleError):
    """The registry cannot do what was asked."""


class NotRegistered(RegistryError):
    """No such model, version or alias."""


class TamperedHistory(RegistryError):
    """The audit log's hash chain does not hold."""


class MonitorError(FettleError):
    """Nothing to compare with, or nothing to compare."""
