"""A server of the bundled model for as long as an example runs. By hand it is `sensorium serve demo`."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def server(*flags: str) -> Iterator[str]:
    """The address of a server: the one on the command line, or one that is started on a free port, and stopped."""
    if len(sys.argv) > 1:
        yield sys.argv[1]
        return
    command = [sys.executable, "-m", "sensorium", "serve", "demo", "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"running on (http://[\d.]+:\d+)", line):
                    yield found[1]
                    return
            sys.exit("the server did not start:\n" + "".join(lines))
        finally:
            process.terminate()
            process.communicate()
