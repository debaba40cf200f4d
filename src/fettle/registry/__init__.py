"""Versions, aliases, reports and an audit log in SQLite; files in a content-addressed folder. Never imports torch."""

from fettle.registry.store import Registry

__all__ = ["Registry"]
