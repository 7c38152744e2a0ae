"""FedPerfix with the head shared: what the local prefixes give when the clients have the same classes."""

from fedperfix.methods.fedperfix import FedPerfix


class PrefixAlone(FedPerfix):
    """FedPerfix that aggregates the head with the backbone; only the prefix plugins stay with the client."""

    name = "prefix-alone"
    summary = "backbone and head shared; prefix plugins of the attention layers local"
    local_groups = ("prefix",)
