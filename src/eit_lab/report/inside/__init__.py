"""The inside of networks as figures, pages and tables, drawn from numbers alone: no torch."""
