"""TLS: whom the client trusts, what it shows, and what it says about files that cannot be used."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from penstock.errors import ConfigError, ConnectFailed, ConnectionLost
from penstock.wire.address import Address
from penstock.wire.connection import Timeouts
from penstock.wire.pool import Pool
from penstock.wire.stream import MAX_UNREAD
from penstock.wire.tls import TLS, reason_of
from tests.scripted import http, run, until

HEAD = b"GET / HTTP/1.1\r\nhost: h\r\n"
BODY = os.urandom(3 << 20)


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=30)


def issue(folder: Path, name: str, extension: str) -> None:
    """A key and a certificate signed by `ca`."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key"]
    openssl(folder, "req", *key, "-subj", f"/CN={name}", "-out", f"{name}.csr")
    (folder / f"{name}.ext").write_text(extension)
    authority = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"]
    openssl(
        folder,
        "x509",
        "-req",
        "-in",
        f"{name}.csr",
        *authority,
        "-extfile",
        f"{name}.ext",
        "-out",
        f"{name}.pem",
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca, another authority, server, client: each a .pem and a .key."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ca", "another"):
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key"]
        openssl(folder, "req", "-x509", *key, "-subj", f"/CN={name}", "-days", "2", "-out", f"{name}.pem")
    issue(folder, "server", "subjectAltName=DNS:localhost,IP:::1\n")
    issue(folder, "client", "extendedKeyUsage=clientAuth\n")
    openssl(folder, "ec", "-in", "client.key", "-aes128", "-passout", "pass:right", "-out", "locked.key")
    return folder


class Listener:
    """What a TLS server saw."""

    def __init__(self) -> None:
        self.port = 0
        self.names: list[str | None] = []
        self.protocols: list[str | None] = []
        self.clients: list[object] = []


@asynccontextmanager
async def listening(
    files: Path, host: str = "127.0.0.1", *, demand: bool = False, newest: ssl.TLSVersion | None = None
) -> AsyncIterator[Listener]:
    """Answers any request with BODY."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files / "server.pem", files / "server.key")
    context.set_alpn_protocols(["h2", "http/1.1"])
    seen = Listener()
    context.sni_callback = lambda _, name, __: seen.names.append(name)
    if newest is not None:
        context.maximum_version = newest
    if demand:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(files / "ca.pem")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        secured = writer.get_extra_info("ssl_object")
        seen.protocols.append(secured.selected_alpn_protocol())
        seen.clients.append(secured.getpeercert())
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(http(200, BODY))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
            tasks.discard(asyncio.current_task())

    tasks: set[asyncio.Task[None] | None] = set()
    server = await asyncio.start_server(serve, host, 0, ssl=context)
    seen.port = server.sockets[0].getsockname()[1]
    try:
        yield seen
    finally:
        server.close()
        await until(lambda: not tasks)


async def ask(url: str, tls: TLS) -> bytes:
    pool = Pool(Address.parse(url), ssl_context=tls.context(), timeouts=Timeouts(connect=5.0))
    try:
        return (await pool.request(HEAD)).body
    finally:
        await pool.close()


def test_the_authority_the_name_and_the_protocol_are_checked(files: Path) -> None:
    trusting = TLS(ca=str(files / "ca.pem"))

    async def main() -> None:
        async with listening(files) as server:
            assert await ask(f"https://localhost:{server.port}", trusting) == BODY
            assert (server.names, server.protocols) == (["localhost"], ["http/1.1"])
            for tls in (TLS(ca=str(files / "another.pem")), TLS()):
                with pytest.raises(
                    ConnectFailed, match="TLS failed: the server's certificate is not accepted"
                ):
                    await ask(f"https://localhost:{server.port}", tls)
            with pytest.raises(ConnectFailed, match="not accepted .*mismatch.*127.0.0.1"):
                await ask(f"https://127.0.0.1:{server.port}", trusting)
            assert await ask(f"https://127.0.0.1:{server.port}", TLS(verify=False)) == BODY

    run(main())


def test_an_ipv6_address(files: Path) -> None:
    async def main() -> None:
        async with listening(files, "::1") as server:
            assert await ask(f"https://[::1]:{server.port}", TLS(ca=str(files / "ca.pem"))) == BODY

    run(main())


def test_a_folder_of_authorities(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "another.pem", tmp_path / "a.pem")
    shutil.copy(files / "ca.pem", tmp_path / "b.crt")
    (tmp_path / "README").write_text("no certificate")

    async def main() -> None:
        async with listening(files) as server:
            url = f"https://localhost:{server.port}"
            assert await ask(url, TLS(ca=str(tmp_path))) == BODY
            openssl(tmp_path, "rehash", ".")
            assert any(name.endswith(".0") for name in os.listdir(tmp_path))  # noqa: PTH208
            assert await ask(url, TLS(ca=str(tmp_path))) == BODY

    run(main())


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_server_that_demands_a_certificate(files: Path, newest: ssl.TLSVersion) -> None:
    anonymous = TLS(ca=str(files / "ca.pem"))
    known = TLS(
        ca=str(files / "ca.pem"),
        certificate=str(files / "client.pem"),
        key=str(files / "locked.key"),
        key_password="right",
    )

    async def main() -> None:
        async with listening(files, demand=True, newest=newest) as server:
            url = f"https://localhost:{server.port}"
            assert await ask(url, known) == BODY
            assert len(server.clients) == 1 and "client" in str(server.clients[0])
            # uvloop's server sends no alert; with TLS 1.3 the client's handshake has ended by then
            with pytest.raises((ConnectFailed, ConnectionLost), match="closed the connection"):
                await ask(url, anonymous)

    run(main())


def test_a_stream_over_tls_pauses_and_loses_nothing(files: Path) -> None:
    async def main() -> None:
        async with listening(files) as server:
            context = TLS(ca=str(files / "ca.pem")).context()
            pool = Pool(Address.parse(f"https://localhost:{server.port}"), ssl_context=context)
            for _ in range(2):
                async with await pool.stream(HEAD) as stream:
                    await until(lambda: stream.paused)
                    await asyncio.sleep(0.02)
                    read = b""
                    while data := await stream.read():
                        read += data
                        assert len(data) <= 3 * MAX_UNREAD
                        await asyncio.sleep(0.001)
                    assert read == BODY
            assert pool.statistics().opened == 1
            await pool.close()

    run(main())


def test_what_openssl_says_is_put_in_words() -> None:
    for reason, words in [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "demands a client certificate"),
        ("TLSV1_ALERT_UNKNOWN_CA", "does not trust our certificate"),
        ("WRONG_VERSION_NUMBER", "does not speak TLS"),
        ("SOMETHING_ELSE", "SOMETHING_ELSE"),
    ]:
        error = ssl.SSLError(1, "x")
        error.reason = reason
        assert words in reason_of(error)


def test_it_pickles_and_hides_its_password(files: Path) -> None:
    tls = TLS(certificate=str(files / "client.pem"), key=str(files / "locked.key"), key_password="right")
    copy = pickle.loads(pickle.dumps(tls))
    assert copy == tls
    context = copy.context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2 and context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert "right" not in repr(tls) and "locked.key" in repr(tls)


def damaged(files: Path) -> TLS:
    (files / "damaged.pem").write_bytes((files / "client.pem").read_bytes().replace(b"MII", b"AAA", 1))
    return TLS(certificate=str(files / "damaged.pem"), key=str(files / "client.key"))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda f: TLS(ca=f"{f}/none.pem"), "authorities .*/none.pem cannot be read: No such file"),
        (lambda f: TLS(ca=f"{f}/ca.key"), "authorities .*/ca.key hold no PEM certificate"),
        (lambda f: TLS(ca=f"{f}/empty"), "folder .*/empty holds no .pem"),
        (lambda f: TLS(certificate=f"{f}/none.pem"), "certificate .*/none.pem cannot be read"),
        (lambda f: TLS(certificate=f"{f}/client.key"), "certificate .*/client.key is not a PEM certificate"),
        (lambda f: TLS(certificate=f"{f}/client.pem"), "key .*/client.pem holds no PEM private key"),
        (lambda f: TLS(certificate=f"{f}/client.pem", key=f"{f}/none.key"), "key .*/none.key cannot be read"),
        (
            lambda f: TLS(certificate=f"{f}/client.pem", key=f"{f}/server.key"),
            "key .*/server.key does not belong to the certificate .*/client.pem",
        ),
        (lambda f: TLS(certificate=f"{f}/client.pem", key=f"{f}/locked.key"), "locked.key is encrypted"),
        (
            lambda f: TLS(certificate=f"{f}/client.pem", key=f"{f}/locked.key", key_password="wrong"),
            "key .*/locked.key has another password",
        ),
        (damaged, "certificate .*/damaged.pem is damaged"),
        (lambda f: TLS(key=f"{f}/client.key"), "of no use without its certificate"),
        (lambda f: TLS(ca=f"{f}/ca.pem", verify=False), "no use when verification is off"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    files: Path, make: Callable[[Path], TLS], complaint: str
) -> None:
    (files / "empty").mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=complaint):
        make(files).context()
