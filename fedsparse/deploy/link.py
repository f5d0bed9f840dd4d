"""The server's side of Flower: messages are pushed to nodes, answers are pulled, and nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

from fedsparse.deploy.messages import Reply
from fedsparse.deploy.records import pack, unpack

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

Pull = Callable[[Iterable[str]], Iterable[tuple[str, "Message | str"]]]
NOT_PUSHED = "the message was not accepted by the SuperLink"


class GridLink:
    """A ``Link`` over a Grid of Flower.

    Answers that were not asked for, a second answer to a message among them, are never pulled.

    Args:
        grid: of the ServerApp.
        pull: function from ids of messages to the answers that are there: pairs of such an id and the answer, or the
            reason why it cannot be had; by default the grid's own function, which waits at least a second for an
            answer that its node is still uploading.

    """

    def __init__(self, grid: Grid, pull: Pull | None = None) -> None:
        self.grid, self._pull = grid, pull or partial(_grids_own, grid)
        self._waiting: dict[str, int] = {}  # id of a message -> the node that has not answered it
        self._failed: list[Reply] = []  # for the next pull

    def nodes(self) -> Sequence[int]:
        """Ids of the nodes that are connected now, in increasing order."""
        return sorted(self.grid.get_node_ids())

    def push(self, messages: Mapping[int, tuple[str, bytes]], round: int) -> None:
        """Send messages, without waiting for answers.

        Args:
            messages: node -> description and payload.
            round: number, which Flower shows as the group of the messages.

        """
        from flwr.app import Message

        sent = [
            Message(pack(meta, payload), dst_node_id=node, message_type="train", group_id=str(round))
            for node, (meta, payload) in messages.items()
        ]
        for node, id in zip_longest(messages, self.grid.push_messages(sent) if sent else ()):
            if id:
                self._waiting[id] = node
            else:
                self._failed.append(Reply(node, "", b"", NOT_PUSHED))

    def pull(self) -> list[Reply]:
        """Take the answers that have arrived since the last pull, without waiting for others."""
        replies, self._failed = self._failed, []
        for id, answer in self._pull(list(self._waiting)) if self._waiting else ():
            if id in self._waiting:
                replies.append(_reply(self._waiting.pop(id), answer))
        return replies


def _grids_own(grid: Grid, ids: Iterable[str]) -> Iterator[tuple[str, Message | str]]:
    """Pull answers by the public function of a grid."""
    for message in grid.pull_messages(ids):
        yield message.metadata.reply_to_message_id, message


def _reply(node: int, message: Message | str) -> Reply:
    """Read the answer of a node; what is no answer of ours is an error of the node, and never raised."""
    if isinstance(message, str):
        return Reply(node, "", b"", message)
    if message.has_error():
        return Reply(node, "", b"", message.error.reason or f"error {message.error.code} of Flower")
    try:
        return Reply(node, *unpack(message), None)
    except ValueError as error:
        return Reply(node, "", b"", str(error))
