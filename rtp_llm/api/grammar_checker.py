"""Checks the grammars of requests before they are accepted, away from the event loop."""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

from rtp_llm.api.preparation import Preparation
from rtp_llm.api.preparer import Preparer
from rtp_llm.errors import RequestError, invalid_params, overloaded
from rtp_llm.text import grammar
from rtp_llm.text.json_schema import GrammarError

CHECK_SECONDS = 10.0  # for one grammar
WAIT_SECONDS = 30.0  # with what is checked or prepared before it
MAX_CHECKED = 1024  # grammars whose results are kept


class GrammarChecker:
    """Checker of grammars: compiles each in a thread or, if that may take long, in the process in which `preparer`
    tokenizes large requests. Keeps the results of the last `MAX_CHECKED` grammars.
    """

    def __init__(self, preparer: Preparer) -> None:
        self._preparer = preparer
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._errors: OrderedDict[bytes, str] = OrderedDict()  # by digest of the grammar; empty: it is valid

    async def check(self, text: str, field: str) -> None:
        """Raises RequestError 400 if the grammar `text`, which the request's `field` asks for, is invalid or takes more
        than CHECK_SECONDS to compile; 429 if too many other grammars and large requests are ahead of it.
        """
        digest = blake2b(text.encode()).digest()
        if digest not in self._errors:
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    self._errors[digest] = await self._find_error(text)
            except TimeoutError:
                raise overloaded(
                    f"{field}: the grammar was not checked within {WAIT_SECONDS:g} s: try again later"
                ) from None
        self._errors.move_to_end(digest)
        if len(self._errors) > MAX_CHECKED:
            self._errors.popitem(last=False)
        if error := self._errors.get(digest):
            raise invalid_params(f"{field}: {error}", field)

    def close(self) -> None:
        """Stops the thread without waiting for it."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _find_error(self, text: str) -> str:
        try:
            if grammar.is_bounded(text):
                await asyncio.get_running_loop().run_in_executor(self._thread, grammar.check, text)
                return ""
            return await self._preparer.run_in_process(Preparation.grammar_error, text.encode(), CHECK_SECONDS)
        except GrammarError as error:
            return str(error)
        except RequestError as error:
            if error.status != 504:
                raise
            return f"the grammar takes more than {CHECK_SECONDS:g} s to check: simplify its patterns"
