"""URLs and keys of teachers on servers. Imports nothing heavy: `camopd serve` needs no torch."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from typing import Any


def is_server(spec: Any) -> bool:
    """Whether a teacher was given as a URL or a list of URLs."""
    if isinstance(spec, (list, tuple)):
        return bool(spec) and all(isinstance(url, str) and is_server(url) for url in spec)
    return isinstance(spec, str) and spec.startswith(("http://", "https://"))


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from its own machine only."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def key_variables(branch: str) -> tuple[str, str]:
    """Environment variables that may hold the API key of a branch's servers, its own one first."""
    return f"CAMOPD_TEACHER_API_KEY_{re.sub(r'[^A-Za-z0-9]', '_', branch).upper()}", "CAMOPD_TEACHER_API_KEY"
