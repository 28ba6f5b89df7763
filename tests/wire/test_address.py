"""Base URLs as people write them."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.wire.address import Address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://h:8000", Address("http", "h", 8000, "", "/v1")),
        ("h:8000", Address("http", "h", 8000, "", "/v1")),
        ("  HTTP://H:8000/v1/ ", Address("http", "h", 8000, "", "/v1")),
        ("localhost", Address("http", "localhost", 80, "", "/v1")),
        ("https://h/v1", Address("https", "h", 443, "", "/v1")),
        ("https://[::1]:8443/v1", Address("https", "::1", 8443, "", "/v1")),
        ("https://h/api/v1", Address("https", "h", 443, "/api", "/api/v1")),
        ("https://h/v1beta/openai/", Address("https", "h", 443, "", "/v1beta/openai")),
        ("http://h/team-a", Address("http", "h", 80, "/team-a", "/team-a/v1")),
        ("http://h/v1x-models", Address("http", "h", 80, "/v1x-models", "/v1x-models/v1")),
        ("unix:8000", Address("http", "unix", 8000, "", "/v1")),
        ("https://bücher.de", Address("https", "xn--bcher-kva.de", 443, "", "/v1")),
    ],
)
def test_what_people_write(text: str, expected: Address) -> None:
    assert Address.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a base URL"),
        ("http://", "not a base URL"),
        ("/v1", "not a base URL"),
        ("ftp://h", "scheme"),
        ("http://u:secret@h", "user name"),
        ("::1", "brackets"),
        ("h:abc", "cannot be read"),
        ("http:/h", "cannot be read"),
        ("h:0", "port"),
        ("h:65536", "port"),
        ("http://h/v1?x=1", "query"),
        ("http://h/v1#x", "fragment"),
        ("http://ex ample", "host name"),
        ("http://h/a b", "characters"),
        ("http://h/a\r\nx-evil: 1", "characters"),
        ("http://h\r\nx-evil: 1", "cannot be read"),
        (f"http://{'x' * 70}", "host name"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Address.parse(text)


@pytest.mark.parametrize(
    ("text", "path", "root", "api"),
    [
        ("unix:///run/vllm.sock", "/run/vllm.sock", "", "/v1"),
        (" unix:/run/vllm.sock ", "/run/vllm.sock", "", "/v1"),
        ("UNIX:///Run/A%20b?c#d", "/Run/A%20b?c#d", "", "/v1"),
        ("http+unix://%2Frun%2Fvllm.sock", "/run/vllm.sock", "", "/v1"),
        ("http+unix://%2Frun%2Fvllm.sock/v1/", "/run/vllm.sock", "", "/v1"),
        ("http+unix://%2Frun%2Fa%20b.sock/team/v1", "/run/a b.sock", "/team", "/team/v1"),
        ("unix:///" + "x" * 106, "/" + "x" * 106, "", "/v1"),
    ],
)
def test_unix_sockets(text: str, path: str, root: str, api: str) -> None:
    address = Address.parse(text)
    assert address == Address("http", "localhost", 80, root, api, path)
    assert address.authority == "localhost"
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("unix://run/vllm.sock", "three slashes"),
        ("unix:///", "absolute path"),
        ("unix:///run/", "absolute path"),
        ("unix:///run/a\0b", "absolute path"),
        ("unix:///" + "x" * 107, "at most 107 bytes, this one 108"),
        ("unix:///" + "é" * 54, "at most 107 bytes, this one 109"),
        ("unix:///\ud800", "path of a file"),
        ("http+unix://run.sock", "absolute path"),
        ("http+unix:///run/vllm.sock", "not a base URL"),
        ("http+unix://%2Frun%2Fa.sock/v1?x", "query"),
        ("http+unix://%2Frun%2Fa.sock/a b", "characters"),
    ],
)
def test_unix_sockets_that_cannot_be_used(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Address.parse(text)


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        Address.parse("http://u:secret@h")
    assert "secret" not in str(caught.value)


names = st.from_regex(r"[a-z]([a-z0-9-]{0,10}[a-z0-9])?(\.[a-z]{2,5})?", fullmatch=True)


@given(st.sampled_from(["http", "https"]), names, st.integers(1, 65535), st.sampled_from(["", "/x", "/x/y"]))
def test_its_own_text_gives_the_address_back(scheme: str, host: str, port: int, root: str) -> None:
    address = Address(scheme, host, port, root, root + "/v1")
    assert Address.parse(str(address)) == address
    assert Address.parse(str(address) + "/v1/") == address


@given(st.binary(min_size=1, max_size=80), st.sampled_from(["", "/x", "/x/y"]))
def test_the_text_of_a_socket_gives_it_back(name: bytes, root: str) -> None:
    path = "/" + os.fsdecode(name.replace(b"\0", b"0").rstrip(b"/"))
    if path != "/":
        address = Address("http", "localhost", 80, root, root + "/v1", path)
        assert str(address).isascii() and str(address).isprintable()
        assert Address.parse(str(address)) == address


@given(st.text(max_size=40) | st.text(max_size=40).map("unix:/{}".format))
def test_any_text_gives_an_address_or_a_config_error(text: str) -> None:
    try:
        address = Address.parse(text)
    except ConfigError:
        return
    line = f"{address.authority}{address.root}{address.api}"
    assert line.isascii() and line.isprintable() and " " not in line
