"""Importing the media layer is cheap, and needs none of the heavy libraries."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "av", "PIL", "httpx", "scipy")


def test_importing_media_loads_no_heavy_library() -> None:
    program = (
        "import sys, sensorium.media, sensorium.media.encode;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
