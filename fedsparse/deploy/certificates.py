"""Keys and certificates of a fleet: its own authority, the server's certificate, and a key for each node."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOOPBACK = ("127.0.0.1", "localhost")  # where Flower's own processes on the server's machine find it
EARLIER = datetime.timedelta(days=1)  # so that a clock that is behind accepts the certificate


class Pair(NamedTuple):
    """A private key and what belongs to it: a certificate, or the public key."""

    key: bytes
    public: bytes


class Authority:
    """An authority that signs certificates of one fleet.

    Args:
        name: of the fleet, for people.
        days: how long its certificates are valid.

    """

    def __init__(self, name: str, days: int) -> None:
        self._key, self._days = generate_private_key(SECP384R1()), days
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedsparse {name}"[:64])])
        usage = x509.KeyUsage(
            key_cert_sign=True,
            crl_sign=True,
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = self._builder(self._name, self._key)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self._certificate = builder.add_extension(usage, critical=True).sign(self._key, SHA256())

    def pair(self) -> Pair:
        """Its private key and its certificate, in PEM."""
        return Pair(_pem(self._key), self._certificate.public_bytes(Encoding.PEM))

    def server(self, host: str) -> Pair:
        """Make the server's private key, and its certificate for a host and for this machine itself, in PEM."""
        key = generate_private_key(SECP384R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = self._builder(subject, key)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        builder = builder.add_extension(identifier, critical=False)
        return Pair(_pem(key), builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM))

    def _builder(self, subject: x509.Name, key: EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        """Begin a certificate of a key."""
        now, identifier = (
            datetime.datetime.now(datetime.UTC),
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
        )
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - EARLIER).not_valid_after(now + datetime.timedelta(days=self._days))
        return builder.add_extension(identifier, critical=False)


def node() -> Pair:
    """Make a node's private and public key, on the curve P-384, in OpenSSH's format."""
    key = generate_private_key(SECP384R1())
    return Pair(
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
    )


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    """Write a private key."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _names(host: str) -> Sequence[x509.GeneralName]:
    """Names and addresses by which a server is called."""
    names: list[x509.GeneralName] = []
    for name in dict.fromkeys([host, *LOOPBACK]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            names.append(x509.DNSName(name))
    return names
