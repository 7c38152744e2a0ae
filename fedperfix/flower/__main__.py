"""`python -m fedperfix.flower init DIR [options]`: write a Flower app that plays a federation.

The options are those of python -m fedperfix.train; they become the app's configuration, in DIR/pyproject.toml.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from fedperfix import __version__
from fedperfix.config import ConfigError, parse_args
from fedperfix.flower.settings import FlowerSettings, check, refuse_local_options, to_run_config
from fedperfix.methods.custom import is_custom
from fedperfix.run.cli import cli
from fedperfix.run.files import write_text

_APP = '''"""A federation of fedperfix; its settings are in pyproject.toml."""

from fedperfix.flower.app import client_app, server_app

__all__ = ["client_app", "server_app"]
'''
_PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedperfix-app"
version = "{version}"
description = "A federation of fedperfix"
license = "MIT"
dependencies = []  # every machine has fedperfix installed, with its extra `flower`

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedperfix"

[tool.flwr.app.components]
serverapp = "app:server_app"
clientapp = "app:client_app"

# As in python -m fedperfix.train --help; "" is an option that is not given.
[tool.flwr.app.config]
{config}
"""
_COMMANDS = """written      {dir}/app.py, {dir}/pyproject.toml

On every machine, in a clone of fedperfix:
  pip install -e ".[flower]"

In every terminal, for work without Flower's servers and without installing packages in the middle of a run:
  export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1

Simulation of {clients} clients on this machine, with `address = ":local:"` in the connection `local` of Flower's
configuration, as it is at first (`flwr config list` says where that is):
  {simulation}

Deployment (docs/flower.md has certificates, keys, and the proxy on port 8443, without which anybody who reaches the
server could register a key or start an app). On the server:
  flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.pem --ssl-keyfile server.key \\
      --enable-supernode-auth --disable-runtime-dependency-installation --host 127.0.0.1 --port 8000
  flwr supernode register client-0.pub mine
On each node:
  flower-supernode --superlink SERVER:8443 --root-certificates ca.crt --auth-supernode-private-key client-0 \\
      --node-config 'partition-id=0 state-dir="/var/lib/fedperfix"'

Then on the server, with 127.0.0.1:8000 in the connection `mine` of Flower's configuration:
  flwr run {dir} mine --stream
"""


@cli
def main(argv: list[str]) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None is the process's own.

    Returns:
        The exit code: 0, or 2 for wrong input (one sentence on stderr).
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    if argv[0] != "init" or len(argv) < 2 or argv[1].startswith("-"):
        raise ConfigError(f"init: got '{' '.join(argv[:2])}', takes init and the name of a new folder")
    target = Path(argv[1])
    if target.exists():
        raise ConfigError(f"DIR: '{target}' exists; takes the name of a new folder")
    refuse_local_options(argv[2:])
    config = parse_args(argv[2:])
    check(config)
    table = to_run_config(config, FlowerSettings())
    target.mkdir(parents=True)
    write_text(target / "app.py", _APP)
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in table.items())
    write_text(target / "pyproject.toml", _PROJECT.format(version=__version__, config=lines))
    quoted, simulation = shlex.quote(str(target)), shlex.join(simulation_command(target, config.clients))
    print(_COMMANDS.format(dir=quoted, clients=config.clients, simulation=simulation))
    if is_custom(config.method):
        print(f"The method is read from '{config.method}': every node and the server need that file at that place.")
    return 0


def simulation_command(app: Path, clients: int) -> list[str]:
    """The words that run an app in Flower's simulation, with one node for each client."""
    return ["flwr", "run", str(app), "local", "--stream", "--federation-config", f"num-supernodes={clients}"]


if __name__ == "__main__":
    sys.exit(main())
