"""Exercises: a file a chapter, to be written by the reader and checked by `python -m docs.check`."""
