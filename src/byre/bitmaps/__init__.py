"""Dirty bitmaps: which parts of a disk were written to since some moment."""
