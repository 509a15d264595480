"""The qcow2 format."""
