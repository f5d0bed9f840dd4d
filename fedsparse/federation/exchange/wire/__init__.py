"""Messages as bytes: header, positions, values."""

from fedsparse.federation.exchange.wire.message import Message, PayloadError, Size, decode, encode

__all__ = ["Message", "PayloadError", "Size", "decode", "encode"]
