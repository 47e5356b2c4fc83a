"""Compiles the grammars of requests on rank 0, in threads, so that a request waits for its own grammar only.

The API process has validated each grammar before: it compiles it for a generic tokenizer with one token per byte. Each
of the two processes takes 40 ms for a JSON schema of 86 kB and caches its results, so they do not share the work.
"""

from collections import OrderedDict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from rtp_llm.contract.request import Request

NUM_THREADS = 2
MAX_CACHED = 64  # compiled grammars
# A state of the lexer takes 1 to 2 kB of each sequence that has visited it. Errors need not show the parser's state.
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class GrammarCompiler:
    """Compiles the grammars of requests in background threads. Sets `Request.matcher` to the result, a matcher of
    llguidance, from which masks of the allowed tokens are computed. Call the methods from one thread.
    """

    def __init__(self, tokenizer: "Future[LLTokenizer]"):
        """`tokenizer`: the model's vocabulary, with the model's number of token ids."""
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(NUM_THREADS, "grammar")
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._waiting: dict[str, Request] = {}

    @property
    def is_busy(self) -> bool:
        """Returns whether any request waits for its grammar."""
        return bool(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Returns the number of requests that wait for their grammar."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Starts to compile the grammar of a request; `take_compiled` returns the request later."""
        self._waiting[request.id] = request
        grammar = request.params.grammar
        if grammar not in self._compiled:
            self._compiled[grammar] = self._threads.submit(self._compile, grammar)
        self._compiled.move_to_end(grammar)

    def remove(self, request_id: str) -> Request | None:
        """Removes a request. Returns it, or None if it does not wait here."""
        return self._waiting.pop(request_id, None)

    def take_compiled(self, timeout: float = 0.0) -> list[Request]:
        """Removes and returns the requests whose grammars are compiled, with `matcher` or `error` set.

        Waits up to `timeout` seconds for at least one.
        """
        futures = {self._compiled[request.params.grammar] for request in self._waiting.values()}
        done, _ = wait(futures, timeout, FIRST_COMPLETED)
        taken = [r for r in self._waiting.values() if self._compiled[r.params.grammar] in done]
        for request in taken:
            del self._waiting[request.id]
            request.matcher, request.error = self._result(request.params.grammar)
        self._evict()
        return taken

    def _compile(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer.result(), grammar, log_level=0, limits=LIMITS)

    def _result(self, grammar: str) -> tuple[LLMatcher | None, str]:
        """Returns the matcher, and the error of the grammar or the tokenizer."""
        future = self._compiled[grammar]
        if error := future.exception():
            return None, str(error)
        return future.result(), future.result().get_error()

    def _evict(self) -> None:
        """Drops the least recently used grammars, except those that a request waits for."""
        needed = {request.params.grammar for request in self._waiting.values()}
        for grammar in list(self._compiled)[: max(0, len(self._compiled) - MAX_CACHED)]:
            if grammar not in needed:
                del self._compiled[grammar]
