"""Views of a run from its folder: live in a terminal, or as an HTML page."""
