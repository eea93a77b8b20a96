"""TLS: with a certificate the server speaks it, and nothing else."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest

from tests.entrypoints.served import served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.waiting import HANG_S

CERTIFICATE = Path(__file__).parents[1] / "media" / "tls_media_example.pem"
"""Signed by itself, with its key."""


def test_requests_are_answered_over_tls_only() -> None:
    files = {"ssl_certfile": str(CERTIFICATE), "ssl_keyfile": str(CERTIFICATE)}
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    trusting.check_hostname = False  # it is another host's
    with served(make_checkpoint("qwen2"), server=files) as server:
        address = server.url.removeprefix("http://")
        with httpx.Client(verify=trusting, trust_env=False, timeout=HANG_S) as client:
            body = {"model": "tiny", "prompt": "Once", "max_tokens": 2, "ignore_eos": True}
            answer = client.post(f"https://{address}/v1/completions", json=body)
            assert answer.json()["usage"]["completion_tokens"] == 2
            with pytest.raises(httpx.TransportError):
                client.get(f"http://{address}/health")
        with (
            httpx.Client(trust_env=False, timeout=HANG_S) as stranger,
            pytest.raises(httpx.ConnectError, match="certificate"),
        ):
            stranger.get(f"https://{address}/health")
