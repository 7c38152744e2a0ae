"""A SuperLink and SuperNodes on this machine, with certificates and keys made for the occasion."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.fedperfix.test_train_cli import ROOT

LOOPBACK = ipaddress.ip_address("127.0.0.1")
BIN = Path(sys.executable).parent
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def environment(home: Path) -> dict[str, str]:
    """Of every process: Flower's folder, its offline switches, and this package."""
    home.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join((str(BIN), os.environ["PATH"]))
    return {**os.environ, **OFFLINE, "FLWR_HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    """A port of this machine that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(done: Callable[[], object], seconds: float, what: str) -> None:
    """Wait, and fail with `what` after some time."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.1)


class Deployment:
    """One server and what connects to it; everything ends with the `with` block.

    Args:
        folder: for keys, logs and states.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = environment(folder / "home")
        self.processes: list[subprocess.Popen] = []
        self.port = free_port()
        self.entrance = self.port  # where nodes connect
        _certificates(folder)
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "mine"\n[superlink.mine]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )

    def __enter__(self) -> Deployment:
        tls = ("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key")
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        auth = ("--enable-supernode-auth", "--disable-runtime-dependency-installation")
        self._start("link", "flower-superlink", *tls, *address, *auth)
        until(lambda: "running on https" in self.log("link"), 60, "the SuperLink does not start")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            kill(process)

    def register(self, name: str) -> None:
        """Make a key, and let it in."""
        make_key(self.folder, name)
        self.flwr("supernode", "register", f"{name}.pub", "mine", seconds=60)

    def node(self, name: str, client: int, *options: str, secure: bool = True) -> subprocess.Popen:
        """Start the node of a client, with the key of this name if there is one."""
        words = ["--superlink", f"127.0.0.1:{self.entrance}", "--port", str(free_port())]
        words += ["--root-certificates", "ca.crt"] if secure else ["--insecure"]
        if (self.folder / name).exists():
            words += ["--auth-supernode-private-key", name]
        place = f'partition-id={client} state-dir="{self.folder / "nodes"}"'
        return self._start(f"node-{name}", "flower-supernode", *words, "--node-config", place, *options)

    def proxy(self, configuration: str) -> None:
        """Start nginx between the nodes and the server, which the configuration has at the ports 8443 and 8000."""
        self.entrance = free_port()
        given = {"8443": str(self.entrance), "8000": str(self.port), "server.example.org": "localhost"}
        for name, value in given.items():
            configuration = configuration.replace(name, value)
        for name in ("server.pem", "server.key", "ca.crt"):
            configuration = configuration.replace(f" {name};", f" {self.folder / name};")
        (self.folder / "nginx.conf").write_text(f"pid {self.folder}/nginx.pid;\ndaemon off;\n{configuration}")
        self._start("nginx", "/usr/sbin/nginx", "-p", str(self.folder), "-c", str(self.folder / "nginx.conf"))
        with open(self.folder / "home" / "config.toml", "a") as file:
            file.write(f'[superlink.outside]\naddress = "127.0.0.1:{self.entrance}"\n')
            file.write(f'root-certificates = "{self.folder / "ca.crt"}"\n')

    def flwr(self, *words: str, seconds: float) -> str:
        """Run Flower's command; returns what it prints."""
        run = self.try_flwr(*words, seconds=seconds)
        assert run.returncode == 0, run.stdout + run.stderr + self.log("link")
        return run.stdout

    def try_flwr(self, *words: str, seconds: float) -> subprocess.CompletedProcess[str]:
        """Run Flower's command, which may fail."""
        command = [BIN / "flwr", *words]
        return subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=seconds
        )

    def log(self, name: str) -> str:
        """What a process has said."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _start(self, log: str, command: str, *words: str) -> subprocess.Popen:
        with open(self.folder / f"{log}.log", "a") as file:
            process = subprocess.Popen(
                [BIN / command, *words],
                cwd=self.folder,
                env=self.env,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process


def kill(process: subprocess.Popen) -> None:
    """End a process and its children at once."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def make_key(folder: Path, name: str) -> None:
    """A node's key pair, as ssh-keygen -t ecdsa -b 384 makes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    plain = serialization.NoEncryption()
    (folder / name).write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    public = key.public_key()
    encoded = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(encoded + b"\n")


def _certificates(folder: Path) -> None:
    """ca.crt, and server.pem with server.key for 127.0.0.1."""
    authority, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("test ca", "localhost")]
    now = datetime.datetime.now(datetime.timezone.utc)

    def made(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(names[0])
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(2))

    root = made(names[0], authority).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    here = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(LOOPBACK)])
    server = made(names[1], own).add_extension(here, critical=False)
    for name, builder in (("ca.crt", root), ("server.pem", server)):
        signed = builder.sign(authority, hashes.SHA256())
        (folder / name).write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form, plain = serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    (folder / "server.key").write_bytes(own.private_bytes(serialization.Encoding.PEM, form, plain))
