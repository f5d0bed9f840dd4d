"""The exchange between clients and server: which coordinates travel, as which bytes, and what both sides can derive."""

from fedsparse.federation.exchange.downlink import Downlink
from fedsparse.federation.exchange.exchange import Exchange, Full
from fedsparse.federation.exchange.filters import ErrorFeedback, Quantize, SignFlip, feedback, precision, sign_flip
from fedsparse.federation.exchange.ledger import Ledger, Link
from fedsparse.federation.exchange.scores import select
from fedsparse.federation.exchange.sparsifiers import Layers, Pattern, RandomK, Sparsifier, Threshold, TopK
from fedsparse.federation.exchange.update import Payload, Update
from fedsparse.federation.exchange.wire import PayloadError, decode, encode

Feedback, Precision = ErrorFeedback, Quantize  # names of earlier versions

__all__ = [
    "Downlink",
    "ErrorFeedback",
    "Exchange",
    "Feedback",
    "Full",
    "Layers",
    "Ledger",
    "Link",
    "Pattern",
    "Payload",
    "PayloadError",
    "Precision",
    "Quantize",
    "RandomK",
    "SignFlip",
    "Sparsifier",
    "Threshold",
    "TopK",
    "Update",
    "decode",
    "encode",
    "feedback",
    "precision",
    "select",
    "sign_flip",
]
