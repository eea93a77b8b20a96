"""Lets only one thread of a process load at a time.

transformers, and parts of torch, import themselves piece by piece when something of them is first used. Their modules
import each other in circles, so that two threads that begin at different places of a circle each find a module that
the other has half made, and one gets an `ImportError`. So everything that starts an engine, in whatever thread, holds
this lock while it resolves settings, loads the tokenizer and makes the core.
"""

from __future__ import annotations

import threading

LOADING = threading.RLock()
