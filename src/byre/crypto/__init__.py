"""Encryption of images: ciphers in bulk, key derivation, LUKS headers, secrets. Knows no node and no format."""
