"""The chat page at /: one HTML document without external resources, and its Content-Security-Policy."""

import base64
import hashlib
from importlib.resources import files

SCRIPTS = ("markdown.js", "console.js")


def chat_page() -> tuple[str, str]:
    """Returns the page and its Content-Security-Policy (w3.org/TR/CSP3).

    The policy allows only the page's own script, by its hash, so that HTML in a model's output cannot run scripts. It
    allows connections to this server only, and forbids showing the page in a frame.
    """
    folder = files("rtp_llm").joinpath("api/console")
    script = "".join(folder.joinpath(name).read_text() for name in SCRIPTS)
    page = folder.joinpath("console.html").read_text().replace("<script></script>", f"<script>{script}</script>")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self';"
        " img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    return page, policy
