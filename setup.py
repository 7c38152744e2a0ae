"""Builds the library of native kernels where a compiler is found. All metadata is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCE = Path("fedperfix_kernels/native/source")
FLAGS = [
    "-std=gnu11",
    "-O2",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
# What each instruction set is compiled with; `portable` runs on every processor of the architecture.
SETS = {"portable": (), "float64": ("-DFLOAT64",)}
if platform.machine().lower() in ("x86_64", "amd64"):
    SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": (*AVX512, "-mavx512bf16")}
    SETS |= {"amx": (*SETS["avx512_bf16"], "-mamx-tile", "-mamx-bf16")}


class BuildLibrary(build_ext):
    """Compiles set.c once for each instruction set that the compiler knows, and links them to one shared library.

    The library uses neither Python nor PyTorch, so its name and its wheel say nothing of their versions.
    """

    def get_ext_filename(self, name: str) -> str:
        """`fedperfix_kernels/native/_library.so`, whatever Python this is."""
        return str(Path(*name.split(".")).with_suffix(".so"))

    def build_extension(self, extension: Extension) -> None:
        """Raises distutils' CompileError where there is no compiler: the extension is optional."""
        extra = os.environ.get("FEDPERFIX_CFLAGS", "").split()
        wanted = os.environ.get("FEDPERFIX_SETS", " ".join(SETS)).split()
        sets = [name for name in SETS if name == "float64" or (name in wanted and self._knows(name))]
        built = " ".join(f"each({name})" for name in sets if name != "float64")
        compilations = [("set.c", name, (f"-DSET={name}", *SETS[name], *extra)) for name in sets]
        compilations += [("library.c", "library", (f"-DBUILT(each)={built}", *extra))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda compilation: self._compile(*compilation), compilations))
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(extension.name), libraries=["m"], extra_postargs=extra
        )

    def _compile(self, source: str, name: str, flags: tuple[str, ...]) -> str:
        folder = Path(self.build_temp) / name
        folder.mkdir(parents=True, exist_ok=True)
        (made,) = self.compiler.compile([str(SOURCE / source)], str(folder), extra_postargs=[*FLAGS, *flags])
        return made

    def _knows(self, name: str) -> bool:
        """Whether the compiler has a set's flags; says so where it does not."""
        with tempfile.TemporaryDirectory() as folder:
            empty = Path(folder, "empty.c")
            empty.write_text("int empty;\n")
            command = [*self.compiler.compiler_so, *SETS[name], "-c", str(empty), "-o", f"{empty}.o"]
            try:
                if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                    return True
            except OSError:  # no compiler: compiling will say so
                return True
        print(
            f"fedperfix: the compiler does not know {' '.join(SETS[name])}: without the set {name}",
            file=sys.stderr,
        )
        return False


class AnyPythonWheel(bdist_wheel):
    """The wheel is for one platform and every Python 3, as the library in it does not know Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "fedperfix_kernels.native._library",
            sources=[str(SOURCE / name) for name in ("set.c", "library.c")],
            depends=[str(path) for path in sorted(SOURCE.iterdir())],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
)
