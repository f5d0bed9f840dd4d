"""The ClientApp, of which a stock SuperNode starts a process for each message; torch is imported within."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsparse.deploy.records import pack, unpack

client = ClientApp()


def answer(message: Message, context: Context) -> Message:
    """Answer one message with the state that the node's folder holds."""
    from fedsparse.deploy.place import Place

    worker = Place.of_flower(context.node_config).worker()
    return Message(pack(*worker.answer(*unpack(message))), reply_to=message)


client.train()(answer)
