"""The address of Ollama, and the header that tells this project's own server from it."""

from __future__ import annotations

import ipaddress
import os

OWN_SERVER = "ollama-forge/"  # begins the Server header of this project's answers

_DEFAULT_PORT = "11434"
_PORTS = {"http": "80", "https": "443"}


def ollama_url() -> str:
    """``OLLAMA_HOST`` as Ollama's own client reads it, else ``http://127.0.0.1:11434``; no slash at the end."""
    value = os.environ.get("OLLAMA_HOST", "").strip().strip("\"'").strip()
    scheme, separator, rest = value.partition("://")
    if not separator:
        scheme, rest = "http", value
        if value == "ollama.com":
            scheme, rest = "https", "ollama.com:443"
    hostport, _, path = rest.partition("/")
    host, port = _split(hostport)
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        port = _PORTS.get(scheme, _DEFAULT_PORT) if separator else _DEFAULT_PORT
    return f"{scheme}://{_connectable(host)}:{port}/{path}".rstrip("/")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _split(hostport: str) -> tuple[str, str]:
    if hostport.startswith("["):
        host, _, port = hostport[1:].partition("]")
        return host, port.removeprefix(":")
    if hostport.count(":") == 1:
        host, _, port = hostport.partition(":")
        return host, port
    return hostport, ""  # without a port; a bare IPv6 address has more colons


def _connectable(host: str) -> str:
    """``host`` as a client must write it: loopback for an unspecified address, IPv6 addresses in brackets."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or "127.0.0.1"
    if address.version == 4:
        return "127.0.0.1" if address.is_unspecified else str(address)
    return "[::1]" if address.is_unspecified else f"[{address}]"
