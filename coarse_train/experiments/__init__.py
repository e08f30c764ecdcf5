"""Experiments; each writes a table, a figure and its config."""
