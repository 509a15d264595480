"""Disk formats: each says where an image's bytes lie inside its children."""
