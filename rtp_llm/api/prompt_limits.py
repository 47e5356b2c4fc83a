"""Limits of the length, the number and the token ids of prompts."""

from dataclasses import dataclass

from rtp_llm.errors import empty_prompt, engine_gone, invalid_params, long_prompt, overloaded


@dataclass(frozen=True)
class PromptLimits:
    """The limits that hold for the prompts of a request when it arrives.

    max_seq_len  maximum number of tokens of a prompt and its output together; 0 until the model has been loaded
    slots, used_slots  maximum number of accepted sequences that have not ended, and how many there are
    max_seq_len_reason, slots_reason  texts for errors: where the limits `max_seq_len` and `slots` come from
    prompt_field  name of the request field that errors about the prompt name
    """

    max_seq_len: int
    max_seq_len_reason: str
    vocab_size: int
    slots: int
    used_slots: int
    slots_reason: str
    prompt_field: str = "prompt"

    @property
    def free_slots(self) -> int:
        return self.slots - self.used_slots

    def check_engine(self) -> None:
        """Raises RequestError 503 if the ranks have not loaded the model since the server started."""
        if not self.max_seq_len:
            raise engine_gone("the model is still loading: see /health")

    def check_length(self, num_tokens: int, prefix: str = "") -> None:
        """Raises RequestError 400 if a prompt of `num_tokens` tokens leaves no room for output. `prefix` precedes the
        number in the message, such as "at least ".
        """
        if num_tokens >= self.max_seq_len:
            # LangChain looks for the first sentence, litellm and others for OpenAI's wording of the second.
            raise long_prompt(
                f"The prompt is too long: it has {prefix}{num_tokens} tokens. This model's maximum context length is "
                f"{self.max_seq_len} tokens ({self.max_seq_len_reason}), of which a prompt may have "
                f"{self.max_seq_len - 1}",
                self.prompt_field,
            )

    def num_kept(self, truncate: int | None, max_tokens: int) -> int | None:
        """Returns the number of last tokens to which a prompt is truncated; None: no truncation.

        truncate: the request's `truncate_prompt_tokens`; -1: as many as fit together with `max_tokens` of output.
        Raises RequestError 400 if -1 leaves no token.
        """
        if truncate != -1:
            return truncate or None
        if max_tokens >= self.max_seq_len:
            raise invalid_params(
                f"max_tokens={max_tokens} leaves no room for a prompt in the {self.max_seq_len} tokens of this model, "
                "so truncate_prompt_tokens=-1 would drop the whole prompt: lower max_tokens",
                "max_tokens",
            )
        return self.max_seq_len - max_tokens

    def check_count(self, sequences: int) -> None:
        """Raises RequestError 400 if a request has more sequences than there are slots, 429 if too few are free."""
        if sequences > self.slots:
            raise invalid_params(
                f"the request has {sequences} sequences (prompts x n); at most {self.slots} fit: {self.slots_reason}"
            )
        if sequences > self.free_slots:
            raise overloaded(
                f"{self.used_slots} sequences are open, {sequences} more do not fit: {self.slots_reason}; "
                "try again later"
            )

    def checked(self, prompt: list[int]) -> list[int]:
        """Returns the token ids `prompt` unchanged. Raises RequestError 400 if there are none, too many, or one that is
        outside the vocabulary.
        """
        if not prompt:
            raise empty_prompt(param=self.prompt_field)
        self.check_length(len(prompt))
        invalid_id = next((t for t in prompt if not 0 <= t < self.vocab_size), None)
        if invalid_id is not None:
            message = f"token id {invalid_id} is outside the vocabulary of {self.vocab_size}"
            raise invalid_params(message, self.prompt_field)
        return prompt
