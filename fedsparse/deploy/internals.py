"""All that fedsparse takes from the inside of Flower 1.42, whose next version may move it; the rest is ``flwr.app``.

A SuperNode of Flower sleeps 3 s between two questions for messages and starts a process for each; a Grid sleeps 1 s
when it meets an answer that is still being uploaded. The functions here speak the same protocol without these waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectUnavailableError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import http_request_response
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from httpx import HTTPError

from fedsparse.deploy.records import pack

FIRST_WAIT, LONGEST_WAIT = 0.05, 1.0  # seconds until an object is asked for again that is still being uploaded
REGISTERED = "a server registers the keys that are in its fleet's folder when it starts"
LOST = (RunNotRunningException, Exception)  # the first, of a run that has ended, is no Exception
log = logging.getLogger(__name__)

whole = partial(
    pull_and_inflate_object_from_tree, return_type=Message, initial_backoff=FIRST_WAIT, backoff_cap=LONGEST_WAIT
)


class Connection:
    """A node's connection to the SuperLink.

    Args:
        calls: what ``http_request_response`` yields.

    Attributes:
        node: id of the node.

    """

    def __init__(self, calls: tuple[Any, ...]) -> None:
        self.node, self._receive, self._send, self._run, _, self._pull, self._push, self._confirm = calls

    def receive(self) -> Message | None:
        """Ask for one message; None if there is none, or if it cannot be had, as when its run has just ended."""
        try:
            found = self._receive()
        except RunNotRunningException:
            return None
        if found is None:
            return None
        head, tree = found
        run = head.metadata.run_id
        try:
            message = whole(tree, partial(self._pull, run), partial(self._confirm, run))
        except LOST as error:  # as a SuperNode of Flower does: the server waits for the answer, or does not
            log.warning("a message of run %s is lost: %s", run, error)
            return None
        return _named(message, tree.object_id)

    def answer(self, message: Message, answer: tuple[str, bytes], seconds: float) -> None:
        """Answer a message; the answer is dropped if the run has ended.

        Args:
            message: that is answered.
            answer: description and payload.
            seconds: that it took to make, which Flower lists as compute time.

        """
        self._reply(Message(pack(*answer), reply_to=message), seconds)

    def fail(self, message: Message, error: Exception, seconds: float) -> None:
        """Answer a message by an error, in the words that Flower has for a ClientApp that raised."""
        reason = f"{type(error)}:<'{error}'>"
        self._reply(Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message), seconds)

    def runs(self, run: int) -> bool:
        """Whether a run still goes on."""
        try:
            self._run(run)
        except RunNotRunningException:
            return False
        return True

    def _reply(self, reply: Message, seconds: float) -> None:
        """Send an answer."""
        run = reply.metadata.run_id
        _named(reply, reply.object_id)
        try:
            with no_object_id_recompute():
                objects = get_all_nested_objects(reply)
                wanted, session = self._send(reply, get_object_tree(reply), seconds)
                push_objects(objects, partial(self._push, run, session), object_ids_to_push=wanted)
        except LOST as error:  # as a SuperNode of Flower does
            log.warning("an answer to run %s is lost: %s", run, error)


@contextmanager
def connected(address: str, authority: Path | None, key: Path | None) -> Iterator[Connection]:
    """Connect a node to the SuperLink, and keep it alive by heartbeats within the ``with`` block.

    Args:
        address: ``host:port``.
        authority: certificate of the authority that signed the server's; None connects without TLS.
        key: the node's private key; None without TLS, where a node registers itself.

    Raises:
        ValueError: the SuperLink refused the node, with its reason.

    """
    failed: Exception | None = None
    insecure, keys = authority is None, None if key is None else _keys(key)
    calls = http_request_response(address, insecure, authority and authority.read_bytes(), keys)
    with _refusal_is_raised() as opened, calls as connection:
        opened()
        try:
            yield Connection(connection)
        except Exception as error:  # which Flower's context would log and drop
            failed = error
    if failed is not None:
        raise failed


def leave(address: str, authority: Path, key: Path, node: int) -> None:
    """End the session of a node whose process was killed, or the SuperLink refuses it until heartbeats are missed.

    Args:
        address: ``host:port``.
        authority: certificate of the authority that signed the server's.
        key: the node's private key.
        node: id under which it was connected.

    """
    signed = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(*_keys(key))]
    with (
        FleetHttpClient.from_server_address(address, False, authority.read_bytes(), signed) as client,
        suppress(HTTPError),  # the session is over already, or the server does not know the node
    ):
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))


@contextmanager
def _refusal_is_raised() -> Iterator[Callable[[], None]]:
    """Raise what Flower logs before it ends the process; not any more after the call of what is yielded."""
    lines: list[str] = []
    logger, handler = logging.getLogger("flwr"), _Lines(lines)
    quiet, level = list(logger.handlers), logger.level
    logger.handlers[:] = [handler]

    def opened() -> None:
        logger.handlers[:] = quiet

    try:
        yield opened
    except SystemExit as end:
        if end.code != 1 or logger.handlers == quiet:
            raise
        raise ValueError(f"the server does not accept this node: {_reason(lines)}; {REGISTERED}") from None
    finally:
        logger.handlers[:], logger.level = quiet, level


def _reason(lines: Sequence[str]) -> str:
    """Find the reason in what Flower logs before it ends a process: in the third line, after code and summary."""
    told = lines[-1].splitlines() if lines else []
    return told[2].rstrip(".") if len(told) > 2 else " ".join(told)


class _Lines(logging.Handler):
    """Keeps messages of a log in a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.lines.append(record.getMessage())


def _keys(path: Path) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
    """Read a node's private key -> it and the public one."""
    key = load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, key.public_key()


def _named(message: Message, id: str) -> Message:
    """Give a message its id, which Flower keeps in a field without a setter."""
    message.metadata.__dict__["_message_id"] = id
    return message


class Uploading(Exception):
    """An object of an answer is still being uploaded by its node."""


class Answers:
    """Pulls answers as ``grid.pull_messages`` does, but waits for none that its node is still uploading.

    An answer whose objects cannot be read is an error of its node, where the grid's function would raise.

    Args:
        grid: of the ServerApp.

    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._uploading: dict[str, Any] = {}  # id of the message that is answered -> tree of the answer's objects

    def __call__(self, ids: Iterable[str]) -> Iterator[tuple[str, Message | str]]:
        """Ask for the answers to messages -> the id of each answered one, with the answer or the reason of a failure.

        Raises:
            RunNotRunningException: the run was stopped.
            HTTPError: the SuperLink refused the question.

        """
        client = self.grid._runtime_client
        asked = [id for id in ids if id not in self._uploading]
        found = client.PullMessages(PullAppMessagesRequest(message_ids=asked)) if asked else PullAppMessagesResponse()
        for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            self._uploading[head.metadata.reply_to_message_id] = tree
        for id, tree in list(self._uploading.items()):
            try:
                answer = whole(tree, self._object, self._confirm)
            except Uploading:
                continue
            except (RunNotRunningException, HTTPError):
                raise
            except Exception as error:  # whatever a node can cause by what it has uploaded
                answer = f"its answer cannot be read: {error}"
            del self._uploading[id]
            yield id, answer

    def _object(self, id: str) -> bytes:
        """Take one object of an answer."""
        pull = make_pull_object_fn_protobuf(self.grid._runtime_client.PullObject, self.grid.node, self.grid.run.run_id)
        try:
            return pull(id)
        except ObjectUnavailableError:
            raise Uploading from None

    def _confirm(self, id: str) -> None:
        """Let the SuperLink delete an answer."""
        grid = self.grid
        request = ConfirmMessageReceivedRequest(node=grid.node, run_id=grid.run.run_id, message_object_id=id)
        grid._runtime_client.ConfirmMessageReceived(request)
