"""One HTTP request with the standard library only.

It also runs as a script inside a network namespace, which the test process cannot reach:

    python fetch.py URL [BODY]        prints [status, text] as JSON; status 0: no response
"""

import json
import sys
import urllib.error
import urllib.request


def fetch(url: str, body: str | None = None, timeout: float = 60) -> tuple[int, str]:
    """Sends GET, or POST if there is a body. Returns (status, text), or (0, reason) without a response."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=None if body is None else body.encode(), headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignore proxy variables of the environment
    try:
        with opener.open(request, timeout=timeout) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


if __name__ == "__main__":
    print(json.dumps(fetch(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)))
