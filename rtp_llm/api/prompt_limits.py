"""Limits of the length, the number and the token ids of prompts."""

from dataclasses import dataclass

from rtp_llm.errors import empty_prompt, engine_gone, invalid_params, long_prompt, overloaded


@dataclass(frozen=True)
class PromptLimits:
    """The current limits of prompts. `max_seq_len` is 0 until the model has been loaded.

    max_seq_len_reason, slots_reason  what limits `max_seq_len` and `slots`, for errors
    slots, used_slots  maximum number of accepted sequences that have not ended, and their current number
    prompt_field  name of the body's field to which errors about the prompt refer
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
        """Raises RequestError 503 until the ranks have loaded the model for the first time."""
        if not self.max_seq_len:
            raise engine_gone("the model is still loading: see /health")

    def check_length(self, num_tokens: int, prefix: str = "") -> None:
        """Raises RequestError 400 if a prompt of `num_tokens` tokens leaves no room for output."""
        if num_tokens >= self.max_seq_len:
            # LangChain looks for the first sentence, litellm and others for OpenAI's wording of the second.
            raise long_prompt(
                f"The prompt is too long: it has {prefix}{num_tokens} tokens. This model's maximum context length is "
                f"{self.max_seq_len} tokens ({self.max_seq_len_reason}), of which a prompt may have "
                f"{self.max_seq_len - 1}",
                self.prompt_field,
            )

    def num_kept(self, truncate: int | None, max_tokens: int) -> int | None:
        """Returns how many of its last tokens a prompt keeps at most; None: all.

        truncate: the request's `truncate_prompt_tokens`; -1: as many as fit together with `max_tokens` of output.
        Raises RequestError 400 if none fits.
        """
        if truncate != -1:
            return truncate or None
        if max_tokens >= self.max_seq_len:
            message = (
                f"max_tokens={max_tokens} leaves no room for a prompt in the {self.max_seq_len} tokens of this model"
            )
            raise invalid_params(f"{message}, so truncate_prompt_tokens=-1 would drop all of it", "max_tokens")
        return self.max_seq_len - max_tokens

    def check_count(self, sequences: int) -> None:
        """Raises RequestError 400 if a request has more sequences than there are slots, 429 if too few are free."""
        if sequences > self.slots:
            raise invalid_params(
                f"the request has {sequences} sequences (prompts x n); at most {self.slots} fit: {self.slots_reason}"
            )
        if sequences > self.free_slots:
            message = f"{self.used_slots} sequences are open, {sequences} more do not fit: {self.slots_reason}"
            raise overloaded(f"{message}; try again later")

    def checked(self, prompt: list[int]) -> list[int]:
        """Returns the prompt. Raises RequestError 400 if it is empty, too long or has an id outside the vocabulary."""
        if not prompt:
            raise empty_prompt(param=self.prompt_field)
        self.check_length(len(prompt))
        invalid_id = next((t for t in prompt if not 0 <= t < self.vocab_size), None)
        if invalid_id is not None:
            message = f"token id {invalid_id} is outside the vocabulary of {self.vocab_size}"
            raise invalid_params(message, self.prompt_field)
        return prompt
