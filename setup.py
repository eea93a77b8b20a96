"""What pyproject.toml can't say: with compiled CPU kernels in the tree, a wheel is for one platform and any Python.

`scripts/release` puts them there. Without them, as in a source checkout, the wheel is for every platform.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel

HAS_KERNELS = any((Path(__file__).parent / "sensorium" / "kernels" / "prebuilt").glob("*.so"))


class SensoriumDistribution(Distribution):
    """Holds machine code where compiled kernels lie in the tree."""

    def has_ext_modules(self) -> bool:
        """Whether the package belongs where a platform's files do."""
        return HAS_KERNELS


class KernelWheel(bdist_wheel):
    """A wheel whose machine code is called through `ctypes`, so that it doesn't depend on a version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform that the wheel is for."""
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


setup(distclass=SensoriumDistribution, cmdclass={"bdist_wheel": KernelWheel})
