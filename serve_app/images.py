"""A request's image: where its bytes may come from, and whether they are an image at all.

Owns the limits on uploads, `data:` URIs and the (normally empty) list of hosts that images are
fetched from. Knows nothing about jobs, models, tensors or responses. Every ValueError is one
sentence fit for the client.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import re

import httpx

from wan_model.image_file import open_upright

FETCH_TIMEOUT_S = 20.0

_DATA_URI = re.compile(r"data:[\w.+/-]*(?:;[\w.+-]+=[\w.+-]*)*;base64,", re.IGNORECASE)

# IPv6 networks that stand for IPv4 addresses, private ones too: NAT64 (RFC 6052, 8215), 6to4 and
# IPv4-compatible ones; and the site-local one, which `is_global` does not know.
_TRANSLATED = ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "::/96")
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, (*_TRANSLATED, "fec0::/10")))


class ImageTooLarge(ValueError):
    """More bytes than the service takes."""


def upright_size(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """(width, height) of a JPEG, PNG or WebP file as it is meant to be seen (EXIF orientation).

    All pixels are decoded: a file that is cut short should be refused here and not fail its job.
    """
    return open_upright(data, max_pixels=max_pixels).size


def decode_data_uri(uri: str, *, max_bytes: int) -> bytes:
    """The bytes of `data:image/...;base64,...`."""
    head = _DATA_URI.match(uri)
    if head is None:
        raise ValueError("not a data URI of the form data:image/png;base64,...")
    # Base64 holds 3 bytes in 4 characters; the slack is for padding and line ends.
    if (len(uri) - head.end()) * 3 // 4 > max_bytes + max_bytes // 32 + 4:
        raise ImageTooLarge(f"the image has more than {max_bytes} bytes")
    try:
        data = base64.b64decode("".join(uri[head.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("the data URI does not hold valid base64") from error
    if len(data) > max_bytes:
        raise ImageTooLarge(f"the image has more than {max_bytes} bytes")
    return data


async def fetch_image(url: str, *, allowed_hosts: tuple[str, ...], max_bytes: int) -> bytes:
    """The bytes at an http(s) URL whose host is one of `allowed_hosts` (names, addresses,
    networks). Follows no redirect, and connects to the very address that was checked."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        raise ValueError("not a valid URL") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise ValueError("only data: URIs and plain http(s) URLs are understood")
    if parsed.port is not None and not 0 < parsed.port < 2**16:
        raise ValueError(f"there is no port {parsed.port}")
    host = parsed.host.lower()
    address = await _allowed_address(host, parsed.port, allowed_hosts)
    request = httpx.Request(
        "GET",
        parsed.copy_with(host=address),
        headers={
            "Host": parsed.netloc.decode("ascii"),
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        },
        extensions={"sni_hostname": host, "timeout": httpx.Timeout(FETCH_TIMEOUT_S).as_dict()},
    )
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S), httpx.AsyncClient(trust_env=False) as client:
            return await _read_limited(client, request, max_bytes)
    except (httpx.HTTPError, httpx.StreamError, TimeoutError) as error:
        raise ValueError(f"the image could not be fetched from {host}") from error


async def _read_limited(client: httpx.AsyncClient, request: httpx.Request, max_bytes: int) -> bytes:
    response = await client.send(request, stream=True, follow_redirects=False)
    try:
        if response.status_code != 200:
            raise ValueError(f"the image's host answered {response.status_code}, not 200")
        data = bytearray()
        async for chunk in response.aiter_raw():  # unpacking could make much of little
            data += chunk
            if len(data) > max_bytes:
                raise ImageTooLarge(f"the image has more than {max_bytes} bytes")
        return bytes(data)
    finally:
        await response.aclose()


async def _allowed_address(host: str, port: int | None, allowed_hosts: tuple[str, ...]) -> str:
    """The address to connect to. A name may only lead to a private network that is itself listed:
    whoever runs its DNS must not choose among our machines."""
    networks = [network for entry in allowed_hosts if (network := _network(entry)) is not None]
    refused = ValueError(f"images are not fetched from {host}: send the image or a data: URI")
    literal = _address(host)
    if literal is not None:
        if not any(literal in network for network in networks):
            raise refused
        return str(literal)
    if host not in allowed_hosts:
        raise refused
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port or 443)
    except OSError as error:
        raise ValueError(f"the host {host} is not known") from error
    addresses = [ipaddress.ip_address(entry[4][0].split("%")[0]) for entry in found]
    for address in addresses:
        if not _is_public(address) and not any(address in network for network in networks):
            raise refused
    return str(addresses[0])


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_global and not any(address in network for network in _NOT_PUBLIC)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return None
