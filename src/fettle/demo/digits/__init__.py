"""A fettle project as a user would write it: fettle.toml, model.py, data.py."""
