"""Data sets of the user in any common layout."""
