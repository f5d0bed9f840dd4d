from dataclasses import replace

from fedsparse.federation.exchange import Exchange


class Growing:
    """Sends what has grown."""

    shared = False  # the receiver has to be told which these are

    def mark(self, theta, anchor, layout, sender):
        return theta > anchor


class Halved(Exchange):
    """Sends half of every change."""

    def encode(self, update):
        return super().encode(replace(update, rows=update.rows / 2))
