"""The same federated work done by this package and by what people use instead: `python -m bench.peers`.

Nothing is installed: a peer that is not there is named with the command that installs it. `docs/peers.md` says what
each of them does and what was measured.
"""
