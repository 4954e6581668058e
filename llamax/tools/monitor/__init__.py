"""A run seen from its folder: live in a terminal, or as a page."""
