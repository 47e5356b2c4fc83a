"""The chat page at /: one HTML document that loads nothing, and the policy under which browsers show it."""

import base64
import hashlib
from importlib.resources import files

SCRIPTS = ("markdown.js", "console.js")


def chat_page() -> tuple[str, str]:
    """Returns the page and its Content-Security-Policy (w3.org/TR/CSP3).

    The page runs its own script, known by its hash: markup in a model's text could run nothing. It talks to this server
    only, and is shown in no frame.
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
