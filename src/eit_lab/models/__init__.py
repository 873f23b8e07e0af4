"""The one backbone, its parts, its cost, and its weights on disk."""
