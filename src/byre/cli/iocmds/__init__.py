"""The commands of ``byre io``: one module per kind of command, none of them known outside ``cli/io.py``."""
