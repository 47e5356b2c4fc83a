"""One HTTP request with nothing but the standard library.

A module of its own because it also runs as a script inside a network namespace, where the test process cannot reach:

    python fetch.py URL [BODY]        prints [status, text] as JSON; status 0: nobody answered
"""

import json
import sys
import urllib.error
import urllib.request


def fetch(url: str, body: str | None = None, timeout: float = 60) -> tuple[int, str]:
    """GET, or POST where there is a body. (status, text of the answer); (0, reason) where nobody answers."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=None if body is None else body.encode(), headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever the environment says
    try:
        with opener.open(request, timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


if __name__ == "__main__":
    print(json.dumps(fetch(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)))
