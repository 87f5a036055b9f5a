"""Triton's own server in the tests, where it is installed: `make test` makes an environment for it
in the folder `triton` of this one, since the server wants another numpy.

It is in the package nvidia-pytriton, and comes with the Python backend; `triton_onnx` stands in for
the one that runs ONNX files.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triton_stand import TritonError

_TYPES = {"BYTES": np.object_, "FP32": np.float32, "BOOL": np.bool_}


def installed() -> tuple[Path, Path]:
    """The environment that has the server, and its packages."""
    folder = Path(os.environ.get("TRITON") or Path(sys.prefix) / "triton")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    if not (packages / "pytriton" / "tritonserver").is_dir():
        pytest.skip(
            f"Triton's server is not in {folder} (Linux on x86-64: `make test` installs it)"
        )
    return folder, packages


class Server:
    """A running server; `log` is what it has printed."""

    def __init__(self, repository: Path, folder: Path) -> None:
        """Start it over a repository and wait until it is ready. folder: for its files."""
        prefix, packages = installed()
        home = packages / "pytriton" / "tritonserver"
        backends = folder / "backends"
        shutil.copytree(home / "backends" / "python", backends / "python")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            pytest.skip(f"the package has no Python backend for Python {version}")
        shutil.copy(stub, backends / "python")
        shutil.copytree(Path(__file__).with_name("triton_onnx"), backends / "onnxruntime")
        program = shutil.copy(home / "bin" / "tritonserver", folder)
        for path in (Path(program), backends / "python" / stub.name):
            path.chmod(0o755)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        libraries = [packages / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            # The backend's Python has the packages of the first python in the path.
            "PATH": f"{prefix / 'bin'}:{os.environ['PATH']}",
        }
        self._url = f"http://127.0.0.1:{port}/v2"
        self._file = folder / "log.txt"
        with self._file.open("w") as log:
            self._process = subprocess.Popen(
                [program, "--model-repository", repository, "--backend-directory", backends,
                 "--http-address", "127.0.0.1", "--http-port", str(port), "--allow-grpc", "false",
                 "--allow-metrics", "false", "--exit-timeout-secs", "5"],
                env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        until = time.monotonic() + 120
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                if "libpython" in self.log and "cannot open shared object" in self.log:
                    pytest.skip("Triton's Python backend needs libpython as a shared library")
                raise AssertionError(f"Triton did not start:\n{self.log}")
            time.sleep(0.2)

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._file.read_text("utf-8", errors="replace")

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def infer(self, name: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run a model on one request of texts.

        Raises:
            TritonError: as the server answered.
        """
        tensors = [
            {"name": key, "datatype": "BYTES", "shape": list(value.shape),
             "data": [text.decode() for text in value.ravel()]}
            for key, value in inputs.items()
        ]  # fmt: skip
        body = json.dumps({"inputs": tensors}).encode()
        request = urllib.request.Request(f"{self._url}/models/{name}/infer", body)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                outputs: list[dict[str, Any]] = json.load(answer)["outputs"]
        except urllib.error.HTTPError as error:
            raise TritonError(json.load(error)["error"]) from None
        found = {}
        for item in outputs:
            kind = _TYPES[item["datatype"]]
            data = [v.encode() for v in item["data"]] if kind is np.object_ else item["data"]
            found[item["name"]] = np.array(data, kind).reshape(item["shape"])
        return found

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
