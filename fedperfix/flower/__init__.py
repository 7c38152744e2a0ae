"""A federation over real machines, with Flower (https://flower.ai) for transport, nodes and keys.

`node.py` is what a client's machine does and `server.py` what the server does; neither imports Flower. `app.py`
connects them through Flower's messages, and `python -m fedperfix.flower init DIR` writes an app that uses it.
"""
