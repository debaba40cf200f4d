"""Conformance kits: what a plug-in of each kind must keep, ours and yours. Nothing in the package imports them."""
