"""The clients and the server of a run on machines of their own, over Flower: ``python -m fedsparse.deploy``.

Flower carries bytes and knows nodes; clients, exchange, aggregation and server are those of the simulator.
"""
