"""The inside of networks as figures, pages and tables, drawn from numbers alone: no torch."""

NUMBERS = "analysis.json"
"""In the folder of an analysis: its numbers, written when all of them are there."""
