"""The NBD protocol: codec, negotiation, server and client."""
