"""Clients, server, and the protocol between them."""
