"""Disks offered to the outside."""
