"""Built-in chat templates for checkpoints that have none. MODEL_TEMPLATE_TYPE selects one by name."""

ALIASES = {"default": "chatml", "qwen": "chatml"}
BY_MODEL_TYPE = {
    "qwen": "chatml",
    "llama_2": "llama2",
    "llama2": "llama2",
    "llama_3": "llama3",
    "llama3": "llama3",
    "mistral": "mistral",
    "mixtral": "mistral",
    "internlm2": "internlm2",
}

# With Hermes-style tools, which Qwen's chat models are trained on.
_CHATML = """\
{%- set has_system = messages and messages[0].role == 'system' %}
{%- if tools %}
{{- '<|im_start|>system\n' ~ (messages[0].content ~ '\n\n' if has_system else '') ~ '# Tools\n\n' }}
{{- 'You may call one or more functions to assist with the user query.\n\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
{%- for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": ' }}
{{- '<args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages[1 if has_system and tools else 0:] %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' }}
{{- '\n<tool_response>\n' ~ message.content ~ '\n</tool_response>' }}
{{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
{%- else %}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content }}
{%- for call in message.tool_calls or [] %}
{{- ('\n' if message.content or not loop.first else '') ~ '<tool_call>\n{"name": "' ~ call.function.name }}
{{- '", "arguments": ' ~ (call.function.arguments | tojson) ~ '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' }}"""

_INTERNLM2 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' }}"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' ~ (message.content | trim) ~ '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' }}"""

# Llama 2 and Mistral support alternating user and assistant turns only; the system text goes into the first turn.
_ALTERNATING_TURNS = """\
{%- set has_system = messages and messages[0].role == 'system' %}
{%- for message in messages[1 if has_system else 0:] %}
{%- if message.role != ('user' if loop.index0 is even else 'assistant') %}
{{- raise_exception('after at most one system message the roles must alternate user, assistant, user, …') }}
{%- endif %}
"""

_LLAMA2 = """\
{%- if message.role == 'user' %}
{{- bos_token ~ '[INST] ' }}
{{- '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' if has_system and loop.first else '' }}
{{- (message.content | trim) ~ ' [/INST]' }}
{%- else %}{{ ' ' ~ (message.content | trim) ~ ' ' ~ eos_token }}
{%- endif %}
{%- endfor %}"""

_MISTRAL = """\
{%- if message.role == 'user' %}
{{- bos_token if loop.first else '' }}
{{- '[INST] ' ~ (messages[0].content ~ '\n\n' if has_system and loop.first else '') ~ message.content ~ ' [/INST]' }}
{%- else %}{{ ' ' ~ (message.content | trim) ~ eos_token }}
{%- endif %}
{%- endfor %}"""

BUILT_IN = {
    "chatml": _CHATML,
    "llama2": _ALTERNATING_TURNS + _LLAMA2,
    "llama3": _LLAMA3,
    "mistral": _ALTERNATING_TURNS + _MISTRAL,
    "internlm2": _INTERNLM2,
}
