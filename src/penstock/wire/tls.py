"""TLS as a person states it: which authority to trust, which certificate to show.

`TLS` holds paths, so that it pickles; `context` reads the files and names the one that cannot be used.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from penstock.errors import ConfigError

_HASHED: Final = re.compile(r"[0-9a-f]{8}\.[0-9]+")
"""What OpenSSL looks for in a folder of certificates; `openssl rehash` makes these names."""
_CERTIFICATES: Final = frozenset({".pem", ".crt", ".cer"})
"""Endings of the files read in a folder without such names."""
_CERTIFICATE: Final = re.compile(rb"-----BEGIN (X509 |TRUSTED )?CERTIFICATE-----")
_KEY: Final = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")

_ALERTS: Final = {
    "CERTIFICATE_REQUIRED": "the server demands a client certificate",
    "UNKNOWN_CA": "the server does not trust our certificate",
    "HANDSHAKE_FAILURE": "the server refused the handshake; perhaps it demands a client certificate",
    "WRONG_VERSION_NUMBER": "the server does not speak TLS on that port",
}
"""What the ends of OpenSSL's reasons mean."""


class TLS(msgspec.Struct, frozen=True, kw_only=True):
    """How a client speaks TLS. Raises ConfigError for settings that would have no effect."""

    ca: str | None = None
    """Authorities to trust: a PEM file or a folder of them; None: the system's."""
    certificate: str | None = None
    """PEM file of our certificate, with the chain behind it, for a server that asks for one."""
    key: str | None = None
    """PEM file of its private key; None: it is in the certificate's file."""
    key_password: str | None = None
    """Of an encrypted key."""
    verify: bool = True
    """False: any server is believed to be who it says. For tests."""

    def __post_init__(self) -> None:
        if self.certificate is None and (self.key is not None or self.key_password is not None):
            raise ConfigError("a TLS key is of no use without its certificate")
        if self.ca is not None and not self.verify:
            raise ConfigError(f"the authorities in {self.ca} are of no use when verification is off")

    def __repr__(self) -> str:
        password = None if self.key_password is None else "***"
        return (
            f"TLS(ca={self.ca!r}, certificate={self.certificate!r}, key={self.key!r}, "
            f"key_password={password!r}, verify={self.verify!r})"
        )

    def context(self) -> ssl.SSLContext:
        """A client's context: TLS 1.2 or newer, HTTP/1.1, host names checked.

        Raises ConfigError, naming the file and what is wrong with it.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.ca is None:
            context.load_default_certs()
        else:
            _trust(context, Path(self.ca))
        if self.certificate is not None:
            _show(context, Path(self.certificate), Path(self.key or self.certificate), self.key_password)
        return context


def reason_of(error: ssl.SSLError) -> str:
    """Why there is no TLS connection, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS failed: the server's certificate is not accepted ({error.verify_message.rstrip('.')})"
    reason = error.reason or str(error)
    meaning = [words for end, words in _ALERTS.items() if reason.endswith(end)]
    return f"TLS failed: {meaning[0] if meaning else reason}"


def _trust(context: ssl.SSLContext, ca: Path) -> None:
    if not ca.is_dir():
        _trust_file(context, ca)
        return
    try:
        files = sorted(ca.iterdir())
    except OSError as error:
        _refuse("the TLS authorities", ca, f"cannot be read: {error.strerror}")
    if any(_HASHED.fullmatch(file.name) for file in files):
        context.load_verify_locations(capath=ca)
        return
    certificates = [file for file in files if file.suffix in _CERTIFICATES]
    if not certificates:
        _refuse("the folder of TLS authorities", ca, "holds no .pem, .crt or .cer file")
    for file in certificates:
        _trust_file(context, file)


def _trust_file(context: ssl.SSLContext, file: Path) -> None:
    what = "the TLS authorities"
    if not _CERTIFICATE.search(_read(what, file)):
        _refuse(what, file, "hold no PEM certificate")
    try:
        context.load_verify_locations(cafile=file)
    except ssl.SSLError as error:
        _refuse(what, file, f"hold a certificate that is damaged ({error.reason or error})")


def _show(context: ssl.SSLContext, certificate: Path, key: Path, password: str | None) -> None:
    """Loads our certificate and its key."""
    chain = _read("the TLS certificate", certificate)
    if not _CERTIFICATE.search(chain):
        _refuse("the TLS certificate", certificate, "is not a PEM certificate")
    if not _KEY.search(_read("the TLS key", key)):
        _refuse("the TLS key", key, "holds no PEM private key")
    asked = False

    def secret() -> str:  # without it OpenSSL would ask at the terminal
        nonlocal asked
        asked = True
        return password or ""

    try:
        context.load_cert_chain(certificate, key, secret)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            _refuse("the TLS key", key, f"does not belong to the certificate {certificate}")
        if asked:
            wrong = "is encrypted: give its password" if password is None else "has another password"
            _refuse("the TLS key", key, wrong)
        if not _whole(certificate):
            _refuse("the TLS certificate", certificate, f"is damaged ({error.reason or error})")
        _refuse("the TLS key", key, f"is damaged ({error.reason or error})")
    except ValueError as error:
        _refuse("the TLS key", key, f"cannot be opened: {error}")


def _whole(certificate: Path) -> bool:
    """OpenSSL can read it."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=certificate)
    except ssl.SSLError:
        return False
    return True


def _read(what: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        _refuse(what, file, f"cannot be read: {error.strerror}")


def _refuse(what: str, file: Path, complaint: str) -> NoReturn:
    raise ConfigError(f"{what} {file} {complaint}") from None
