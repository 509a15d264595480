"""How bytes move; knows no node and no format."""
