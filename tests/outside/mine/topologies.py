class EvenOdd:
    """Two global models: of clients with even, and with odd numbers."""

    groups = 2

    def group(self, clients):
        return tuple(client % 2 for client in clients)
