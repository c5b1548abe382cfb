"""The page at `/`: one file, sent with a policy that lets it run its own script and speak to this server, and nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files

MEDIA_TYPE = "text/html; charset=utf-8"


@functools.cache
def html() -> str:
    return files("headwise.server").joinpath("page.html").read_text(encoding="utf-8")


@functools.cache
def headers() -> dict[str, str]:
    """Security headers; script and style are allowed by their hashes, and no text can become markup (trusted types)."""
    policy = [
        "default-src 'none'",
        f"script-src {_hashes('script')}",
        f"style-src {_hashes('style')}",
        "connect-src 'self'",
        "img-src data:",  # the empty icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
    return {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
        "Vary": "Accept",
    }


def _hashes(element: str) -> str:
    found = re.findall(rf"<{element}>(.*?)</{element}>", html(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)
