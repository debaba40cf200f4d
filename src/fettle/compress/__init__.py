"""Making a model smaller and faster. Every method is a `Step`: one frozen dataclass, one file."""
