"""A certification authority for one test run: folders in the peer's layout for servers and clients."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def make_authority(folder: Path, name: str = "Test CA") -> Path:
    """``folder`` gets ca-cert.pem and ca-key.pem; skips the test where openssl is missing."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    _openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
        "-subj", f"/CN={name}", "-addext", "basicConstraints=critical,CA:true",
        "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        "-keyout", folder / "ca-key.pem", "-out", folder / "ca-cert.pem",
    )  # fmt: skip
    return folder


def issue(authority: Path, folder: Path, side: str, name: str) -> Path:
    """``folder`` gets ca-cert.pem and a certificate for ``side`` ("server", "client"), valid for host ``name``."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "IP" if name.replace(".", "").isdecimal() else "DNS"
    shutil.copy(authority / "ca-cert.pem", folder)
    request, extensions = folder / f"{side}.csr", folder / f"{side}.ext"
    extensions.write_text(f"subjectAltName={kind}:{name}\nextendedKeyUsage={side}Auth\nbasicConstraints=CA:false\n"
                          "keyUsage=critical,digitalSignature\n")  # fmt: skip
    _openssl(
        "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/O=Tests/CN={name}",
        "-keyout", folder / f"{side}-key.pem", "-out", request,
    )  # fmt: skip
    _openssl(
        "x509", "-req", "-in", request, "-CA", authority / "ca-cert.pem", "-CAkey", authority / "ca-key.pem",
        "-CAcreateserial", "-days", "30", "-extfile", extensions, "-out", folder / f"{side}-cert.pem",
    )  # fmt: skip
    return folder


def _openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, timeout=60)
